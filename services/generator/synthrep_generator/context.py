"""What the routes share, and the ways in which they all take and give lists."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, TypeVar

from fastapi import Depends, HTTPException, Path, Query, Request

from synthrep_generator.admission import Admission
from synthrep_generator.backlog import LiveWork
from synthrep_generator.catalog import Catalog, FoundGroup
from synthrep_generator.problems import not_found
from synthrep_generator.progress import DatasetIndex, utc_now
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.tally import Batch
from synthrep_shared.asgi import NEEDS_NO_KEY, may_enter, principal_of
from synthrep_shared.keys import Principal
from synthrep_shared.messages import BatchView
from synthrep_shared.samples import DATASET_PATTERN

MAX_PAGE = 1000

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items in one answer")]
Cursor = Annotated[
    str | None, Query(max_length=128, description="`next_cursor` of the answer before")
]
Position = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,15}$", description="`next_cursor` of the answer before")
]
DatasetId = Annotated[str, Path(pattern=DATASET_PATTERN, description="Name of a data set")]
BatchId = Annotated[str, Path(max_length=128, description="Id of a batch")]
Gid = Annotated[str, Path(max_length=128, description="Id of a group")]
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What one service process holds."""

    settings: GeneratorSettings
    catalog: Catalog
    live: LiveWork
    admission: Admission
    epoch: str = field(default_factory=partial(secrets.token_hex, 4))
    """Tells what this process counts from what another did."""

    def batch_view(self, index: DatasetIndex, batch: Batch) -> BatchView:
        """The batch's state now."""
        running = self.live.running().get(batch.id, 0)
        return index.view(batch, running=running, now=utc_now())

    def view_at_hand(self, caller: Principal, batch_id: str) -> BatchView | None:
        """The state of a batch of the caller's; None where that may take a while to say."""
        found = self.catalog.known_batch(batch_id)
        running = self.live.running_at_hand()
        if found is None or running is None or not may_handle(caller, found[1]):
            return None
        index, batch = found
        return index.view_at_hand(batch, running=running.get(batch.id, 0), now=utc_now())

    def datasets(self, caller: Principal) -> list[DatasetIndex]:
        """The data sets that the caller reaches, by name."""
        return [index for index in self.catalog.datasets() if may_reach(caller, index)]

    def dataset(self, caller: Principal, name: str) -> DatasetIndex:
        """The data set; raises 404, also for one that the caller does not reach."""
        index = self.catalog.dataset(name)
        if index is None or not may_reach(caller, index):
            raise not_found("data set")
        return index

    def batch(self, caller: Principal, batch_id: str) -> tuple[DatasetIndex, Batch]:
        """The batch and its data set; raises 404, also for another owner's."""
        found = self.catalog.batch(batch_id)
        if found is None or not may_handle(caller, found[1]):
            raise not_found("batch")
        return found

    def group(self, caller: Principal, gid: str) -> FoundGroup:
        """The group; raises 404, also for another owner's in a data set beyond reach."""
        found = self.catalog.group(gid)
        if found is None or not (may_reach(caller, found.index) or self.may_reject(caller, found)):
            raise not_found("group")
        return found

    def may_reject(self, caller: Principal, found: FoundGroup) -> bool:
        """Whether the group comes from a batch of the caller's."""
        batch = found.index.batch(found.ref.batch)
        return caller.is_admin or (batch is not None and may_handle(caller, batch))


def may_reach(caller: Principal, index: DatasetIndex) -> bool:
    """Whether the caller sees the data set: its key names it, or names none and made it."""
    if caller.datasets is not None:
        return caller.lists(index.name)
    return caller.is_admin or caller.owner == index.owner


def may_handle(caller: Principal, batch: Batch) -> bool:
    """Whether the batch is the caller's, in a data set that its key does not leave out."""
    is_listed = caller.datasets is None or caller.lists(batch.dataset)
    return caller.owns(batch.owner) and is_listed


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


ContextDep = Annotated[Context, Depends(_context)]
CallerDep = Annotated[Principal, Depends(_caller)]


def cut_page(
    items: Sequence[T], names: Sequence[str], cursor: str | None, limit: int
) -> tuple[list[T], str | None]:
    """The items whose name is above the cursor, and the next cursor; `names` are sorted."""
    start = 0 if cursor is None else bisect_right(names, cursor)
    shown = list(items[start : start + limit])
    has_more = start + limit < len(items)
    return shown, names[start + limit - 1] if has_more else None
