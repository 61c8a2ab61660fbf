"""Routes of what was made: data sets and their sealed shards."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from synthrep_generator.context import (
    CallerDep,
    ContextDep,
    Cursor,
    DatasetId,
    Limit,
    Position,
    cut_page,
)
from synthrep_generator.problems import not_found
from synthrep_shared.asgi import ProblemResponse, needs, problem_answers
from synthrep_shared.commit_log import CommitRecord
from synthrep_shared.messages import DatasetView, Page, ShardView

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
_MAX_SEQ = 10**15 - 1
_MEDIA_TYPE = "application/x-tar"
_TAR = {"content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
_FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    **problem_answers(404, 416),
    200: {"description": "The whole file", **_TAR},
    206: {"description": "The range that was asked for", **_TAR},
}
_BAD_RANGE = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
Seq = Annotated[int, Query(ge=0, le=_MAX_SEQ, description="Sequence number to go on from")]
ShardName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class ShardResponse(FileResponse):
    """A file with ranges, whose refusal of a range is a problem."""

    media_type = _MEDIA_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        refusal: ProblemResponse | None = None

        async def send_or_refuse(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in _BAD_RANGE:
                size = self.headers["content-length"]
                refusal = ProblemResponse(
                    416, "the range is malformed or outside the file",
                    headers={"content-range": f"bytes */{size}"},
                )  # fmt: skip
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_or_refuse)
        if refusal is not None:
            await refusal(scope, receive, send)


@router.get(
    "",
    response_model=Page[DatasetView],
    summary="Data sets by name",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def list_all(
    context: ContextDep, caller: CallerDep, cursor: Cursor = None, limit: Limit = 100
) -> Page[DatasetView]:
    """Counts are those of the commit log."""
    indexes = context.datasets(caller)
    shown, next_cursor = cut_page(indexes, [index.name for index in indexes], cursor, limit)
    return Page[DatasetView](items=[i.dataset_view() for i in shown], next_cursor=next_cursor)


@router.get(
    "/{dataset}",
    response_model=DatasetView,
    summary="Counts of a data set",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, caller: CallerDep, dataset: DatasetId) -> DatasetView:
    """`last_seq` is the position that the commit log has reached."""
    return context.dataset(caller, dataset).dataset_view()


@router.get(
    "/{dataset}/shards",
    response_model=Page[ShardView],
    summary="Sealed shards after a position of the commit log",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def list_shards(
    context: ContextDep,
    caller: CallerDep,
    dataset: DatasetId,
    after: Seq = 0,
    cursor: Position = None,
    limit: Limit = 100,
) -> Page[ShardView]:
    """In the order of `seq`. A follower asks again with `after` set to the last `seq` it saw."""
    index = context.dataset(caller, dataset)
    shards = index.shards(after if cursor is None else int(cursor), limit + 1)
    shown = shards[:limit]
    next_cursor = str(shown[-1].seq) if len(shards) > limit else None
    return Page[ShardView](items=shown, next_cursor=next_cursor)


@router.get(
    "/{dataset}/records",
    response_model=Page[CommitRecord],
    summary="The commit log after a position",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def list_records(
    context: ContextDep,
    caller: CallerDep,
    dataset: DatasetId,
    after: Seq = 0,
    cursor: Position = None,
    limit: Limit = 100,
) -> Page[CommitRecord]:
    """Every record as it is, with the groups of shards and the rejections that came later.

    Enough to follow a data set without its disk; numbers have no holes.
    """
    index = context.dataset(caller, dataset)
    records = index.records(after if cursor is None else int(cursor), limit + 1)
    shown = records[:limit]
    next_cursor = str(shown[-1].seq) if len(records) > limit else None
    return Page[CommitRecord](items=shown, next_cursor=next_cursor)


@router.head("/{dataset}/shards/{name}", include_in_schema=False, openapi_extra=needs("read"))
@router.get(
    "/{dataset}/shards/{name}",
    response_class=ShardResponse,
    summary="A sealed shard",
    responses=_FILE_ANSWERS,
    openapi_extra=needs("read"),
)
def get_shard(
    context: ContextDep, caller: CallerDep, dataset: DatasetId, name: ShardName
) -> ShardResponse:
    """The tar file, whole or by `Range`; it never changes, and its `ETag` is its sha256."""
    try:
        found = context.dataset(caller, dataset).shard(name)
    except FileNotFoundError:
        found = None
    if found is None or not found[1].is_file():
        raise not_found("shard")
    shard, path = found
    headers: Mapping[str, str] = {
        "etag": f'"{shard.sha256}"',
        "cache-control": "private, max-age=31536000, immutable",
    }
    return ShardResponse(path, headers=headers, media_type=_MEDIA_TYPE, stat_result=path.stat())
