"""Routes of groups: where the images of a prompt come from, the images, and taking them back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Response

from synthrep_generator.catalog import FoundGroup
from synthrep_generator.context import CallerDep, ContextDep, Gid
from synthrep_generator.failure_reader import views_of_record
from synthrep_generator.problems import not_found
from synthrep_generator.shard_reader import read_image, read_metadata
from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.messages import GroupView

router = APIRouter(prefix="/v1/groups", tags=["groups"])
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_ANSWERS: dict[int | str, dict[str, Any]] = {
    **problem_answers(404),
    200: {
        "description": "The image as it is stored",
        "content": dict.fromkeys(("image/jpeg", "image/png", "image/webp"), _BINARY),
    },
}
ImageIndex = Annotated[int, Path(ge=0, le=9999, description="Position in the group, from 0")]


def _view(found: FoundGroup) -> GroupView:
    index, record, ref = found.index, found.record, found.ref
    is_committed = record.kind == "shard"
    samples, failure = [], None
    if is_committed:
        samples = read_metadata(index.shard_file(record), ref.gid, ref.images)
    else:
        (failure,) = views_of_record(index, record, [ref])
    return GroupView(
        gid=ref.gid,
        dataset=index.name,
        batch=ref.batch,
        index=ref.index,
        caption_id=ref.caption_id,
        state="committed" if is_committed else "failed",
        rejected=found.is_rejected,
        seq=record.seq,
        shard=record.name if is_committed else None,
        images=ref.images,
        samples=samples,
        failure=failure,
        created_at=record.created_at,
    )


@router.get(
    "/{gid}",
    response_model=GroupView,
    summary="Where the images of a prompt come from",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, caller: CallerDep, gid: Gid) -> GroupView:
    """`samples` holds what it takes to make each image again."""
    return _view(context.group(caller, gid))


@router.get(
    "/{gid}/images/{image_index}",
    response_class=Response,
    summary="One image",
    responses=_IMAGE_ANSWERS,
    openapi_extra=needs("read"),
)
def get_image(
    context: ContextDep, caller: CallerDep, gid: Gid, image_index: ImageIndex
) -> Response:
    """The stored bytes; they never change."""
    found = context.group(caller, gid)
    if found.record.kind != "shard":
        raise not_found("image")
    image = read_image(found.index.shard_file(found.record), gid, image_index)
    if image is None:
        raise not_found("image")
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return Response(image.data, media_type=image.media_type, headers=headers)


@router.post(
    "/{gid}/reject",
    response_model=GroupView,
    summary="Take a group back",
    responses=problem_answers(404, 409, 503, 507),
    openapi_extra=needs("submit"),
)
def reject(context: ContextDep, caller: CallerDep, gid: Gid) -> GroupView:
    """Trainers skip the group from then on; it stays in its shard. Twice is as good as once."""
    found = context.group(caller, gid)
    if not context.may_reject(caller, found):
        raise not_found("group")
    if found.record.kind != "shard":
        raise HTTPException(409, "the group has no images to take back")
    found.index.reject(found.ref)
    return _view(context.group(caller, gid))
