"""What the routes share, and the ways in which they all take and give lists."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Query, Request

from synthrep_generator.admission import Admission
from synthrep_generator.backlog import LiveWork
from synthrep_generator.catalog import Catalog
from synthrep_generator.problems import not_found
from synthrep_generator.progress import DatasetIndex, utc_now
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.tally import Batch
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

    def batch_view(self, index: DatasetIndex, batch: Batch) -> BatchView:
        """The batch's state now."""
        running = self.live.running().get(batch.id, 0)
        return index.view(batch, running=running, now=utc_now())

    def dataset(self, name: str) -> DatasetIndex:
        """The data set; raises 404."""
        index = self.catalog.dataset(name)
        if index is None:
            raise not_found("data set")
        return index

    def batch(self, batch_id: str) -> tuple[DatasetIndex, Batch]:
        """The batch and its data set; raises 404."""
        found = self.catalog.batch(batch_id)
        if found is None:
            raise not_found("batch")
        return found


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]


def cut_page(
    items: Sequence[T], names: Sequence[str], cursor: str | None, limit: int
) -> tuple[list[T], str | None]:
    """The items whose name is above the cursor, and the next cursor; `names` are sorted."""
    start = 0 if cursor is None else bisect_right(names, cursor)
    shown = list(items[start : start + limit])
    has_more = start + limit < len(items)
    return shown, names[start + limit - 1] if has_more else None
