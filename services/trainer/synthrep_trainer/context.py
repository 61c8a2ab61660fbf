"""What the API's routes share, and the ways in which they all take bodies and give lists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from synthrep_trainer.problems import not_found
from synthrep_trainer.runs import ProbeFolder, RunFolder, Workplace, is_id
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
MAX_PAGE = 1000

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items in one answer")]
Cursor = Annotated[
    str | None, Query(max_length=128, description="`next_cursor` of the answer before")
]
RunId = Annotated[str, Path(max_length=128, description="Id of a run")]
ProbeId = Annotated[str, Path(max_length=128, description="Id of a probe")]
F = TypeVar("F", RunFolder, ProbeFolder)
M = TypeVar("M", bound=BaseModel)
V = TypeVar("V")


@dataclass(frozen=True)
class Context:
    """What one service process holds."""

    settings: TrainerSettings
    place: Workplace

    def run(self, run_id: str) -> RunFolder:
        """The run; raises 404."""
        found = self.place.run(run_id)
        if found is None:
            raise not_found("run")
        return found

    def probe(self, probe_id: str) -> ProbeFolder:
        """The probe; raises 404."""
        found = self.place.probe(probe_id)
        if found is None:
            raise not_found("probe")
        return found


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _json_body(request: Request) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, "send application/json")
    return await request.body()


ContextDep = Annotated[Context, Depends(_context)]
JsonBody = Annotated[bytes, Depends(_json_body)]


def parse_body(model: type[M], body: bytes) -> M:
    """The request in a JSON body; raises what becomes 422."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(
            error.errors(include_url=False, include_context=False, include_input=False)
        ) from error


def newest_first(
    folders: Sequence[F], cursor: str | None, limit: int
) -> tuple[list[F], str | None]:
    """A page of folders, which come oldest first, and the next cursor; ids sort by time."""
    if cursor is not None and not is_id(cursor):
        raise HTTPException(422, "cursor is not one that this list gave")
    older = [f for f in reversed(folders) if cursor is None or f.id < cursor]
    return older[:limit], older[limit - 1].id if len(older) > limit else None


def readable(view: Callable[[F], V], folders: Sequence[F]) -> list[V]:
    """The views of those folders whose files this version can read; the others are logged."""
    views = []
    for folder in folders:
        try:
            views.append(view(folder))
        except ValidationError:
            _log.exception("file_unreadable", extra={"id": folder.id})
    return views


def number_from_cursor(cursor: str | None, default: int) -> int:
    """The position that a cursor of digits stands for; raises 422 for any other."""
    if cursor is None:
        return default
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 16):
        raise HTTPException(422, "cursor is not one that this list gave")
    return int(cursor)
