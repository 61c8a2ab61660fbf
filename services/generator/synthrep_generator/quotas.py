"""What one owner may have: prompts at a time, and prompts in a day, counted from intake files."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from synthrep_generator.errors import QuotaError
from synthrep_generator.tally import Batch
from synthrep_shared.keys import Principal
from synthrep_shared.storage import Location

_DAY = timedelta(hours=24)


def has_quotas(caller: Principal) -> bool:
    """Whether the caller's key bounds what its owner may have."""
    return (caller.max_outstanding_prompts, caller.max_prompts_per_day) != (None, None)


@contextmanager
def owner_lock(root: Location, owner: str) -> Iterator[None]:
    """Keep out every other thread, process and host that counts what this owner has.

    An object store has no locks: there, several processes may pass a quota together by what each
    of them publishes within one request to the store.
    """
    if not isinstance(root, Path):
        yield
        return
    folder = root / ".quotas"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(owner.encode()).hexdigest()[:32]
    with (folder / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_quotas(
    caller: Principal, batches: Iterable[Batch], *, coming: int, num_prompts: int, now: datetime
) -> None:
    """Raises QuotaError if `num_prompts` more would pass a quota of the caller's key.

    `batches` are those of all owners, `coming` the owner's prompts that are not in them yet.
    """
    if not has_quotas(caller):
        return
    own = [batch for batch in batches if batch.owner == caller.owner]
    outstanding = coming + sum(batch.unfinished for batch in own)
    limit = caller.max_outstanding_prompts
    if limit is not None and outstanding + num_prompts > limit:
        raise QuotaError(
            f"{outstanding} prompts of this owner are unfinished, {num_prompts} more would pass "
            f"its quota of {limit}; send them later",
            excess=outstanding + num_prompts - limit,
        )
    limit = caller.max_prompts_per_day
    if limit is None:
        return
    recent = sorted(
        (batch.created_at, batch.num_prompts) for batch in own if batch.created_at > now - _DAY
    )
    accepted = coming + sum(count for _, count in recent)
    if accepted + num_prompts > limit:
        raise QuotaError(
            f"{accepted} prompts of this owner were accepted in 24 h, {num_prompts} more would "
            f"pass its quota of {limit}; send them later",
            retry_after_s=_frees_in_s(recent, accepted + num_prompts - limit, now),
        )


def _frees_in_s(recent: list[tuple[datetime, int]], excess: int, now: datetime) -> int:
    """Seconds until the oldest batches that hold `excess` prompts are a day old."""
    for created_at, count in recent:
        excess -= count
        if excess <= 0:
            return 1 + int((created_at + _DAY - now).total_seconds())
    return int(_DAY.total_seconds())
