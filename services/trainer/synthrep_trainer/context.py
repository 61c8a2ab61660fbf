"""What the API's routes share, and the ways in which they all take bodies and give lists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import Depends, Header, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from synthrep_shared.asgi import NEEDS_NO_KEY, may_enter, principal_of
from synthrep_shared.keys import Principal
from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer.problems import not_found
from synthrep_trainer.runs import ProbeFolder, RunFolder, Workplace, is_id
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
MAX_PAGE = 1000

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items in one answer")]
Cursor = Annotated[
    str | None, Query(max_length=128, description="`next_cursor` of the answer before")
]
RunId = Annotated[str, InPath(max_length=128, description="Id of a run")]
ProbeId = Annotated[str, InPath(max_length=128, description="Id of a probe")]
F = TypeVar("F", RunFolder, ProbeFolder)
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Makes a request safe to repeat: the same key and body get the same answer",
    ),
]
M = TypeVar("M", bound=BaseModel)
V = TypeVar("V")


@dataclass(frozen=True)
class Context:
    """What one service process holds."""

    settings: TrainerSettings
    place: Workplace
    is_ending: Callable[[], bool] = bool
    """Whether the server is about to end, and streams with it; by default it never is."""

    def owned(self, caller: Principal, folders: Sequence[F]) -> list[F]:
        """Those of the folders that are the caller's; an unreadable one is an admin's."""
        if caller.is_admin:
            return list(folders)
        owners = readable(lambda folder: (folder, _owner_of(folder)), folders)
        return [folder for folder, owner in owners if caller.owns(owner)]

    def run(self, caller: Principal, run_id: str) -> RunFolder:
        """The run; raises 404, also for another owner's."""
        found = self.place.run(run_id)
        if found is None or not caller.owns(found.record.owner):
            raise not_found("run")
        return found

    def may_probe(self, caller: Principal, run_id: str) -> bool:
        """Whether there is such a run of the caller's."""
        found = self.place.run(run_id)
        return found is not None and caller.owns(found.record.owner)

    def num_queued(self, folders: Sequence[F]) -> int:
        """How many of them wait for a launcher, but for those that this version cannot read."""
        return readable(lambda folder: folder.state, folders).count("queued")

    def earlier_run(
        self, caller: Principal, key: str | None, request: RunRequest
    ) -> RunFolder | None:
        """The run that the caller's key already made; raises IdempotencyConflictError."""
        run_id = key and self.place.run_claims.find(caller.owner, key, request)
        return self.place.run(run_id) if run_id else None

    def earlier_probe(
        self, caller: Principal, key: str | None, request: ProbeRequest
    ) -> ProbeFolder | None:
        """The probe that the caller's key already made; raises IdempotencyConflictError."""
        probe_id = key and self.place.probe_claims.find(caller.owner, key, request)
        return self.place.probe(probe_id) if probe_id else None

    def probe(self, caller: Principal, probe_id: str) -> ProbeFolder:
        """The probe; raises 404, also for another owner's."""
        found = self.place.probe(probe_id)
        if found is None or not caller.owns(found.record.owner):
            raise not_found("probe")
        return found


def _owner_of(folder: RunFolder | ProbeFolder) -> str:
    # mypy takes the __hash__ of instances for that of their class.
    return _owner(type(folder), str(folder.path))  # type: ignore[arg-type]


@lru_cache(maxsize=1 << 16)
def _owner(kind: type[RunFolder | ProbeFolder], path: str) -> str:
    """Whose request it is, which never changes; raises ValidationError."""
    return kind(Path(path)).record.owner


async def authorise(request: Request) -> None:
    """Lets a request into its route: the route says what it needs, and without a word nobody may.

    Raises 403.
    """
    operation = request.scope["route"].openapi_extra
    if operation == NEEDS_NO_KEY:
        return
    if not may_enter(principal_of(request.scope), operation):
        raise HTTPException(403, "the key lacks the scope that this takes, see /openapi.json")


async def _caller(request: Request) -> Principal:
    return principal_of(request.scope)


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _json_body(request: Request) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, "send application/json")
    return await request.body()


ContextDep = Annotated[Context, Depends(_context)]
CallerDep = Annotated[Principal, Depends(_caller)]
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
        except ValueError:
            _log.exception("file_unreadable", extra={"id": folder.id})
    return views


def number_from_cursor(cursor: str | None, default: int) -> int:
    """The position that a cursor of digits stands for; raises 422 for any other."""
    if cursor is None:
        return default
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 16):
        raise HTTPException(422, "cursor is not one that this list gave")
    return int(cursor)
