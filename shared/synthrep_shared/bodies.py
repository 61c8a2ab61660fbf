"""Request bodies that go to disk as they come: a slow client holds a file and no thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import IO

import anyio
from anyio.to_thread import run_sync

MIN_BYTES_PER_S = 32 << 10
_WRITE_BYTES = 1 << 20


async def spool_body(
    chunks: AsyncIterator[bytes],
    file: IO[bytes],
    *,
    silence_s: float,
    min_bytes_per_s: float = MIN_BYTES_PER_S,
) -> None:
    """Write a body to `file` and go back to its start.

    Raises TimeoutError when the body has fallen `silence_s` behind one that comes at
    `min_bytes_per_s`, as it does in so long a silence; OSError when the disk is full, and what
    `chunks` raises.
    """
    pending, patience_s = bytearray(), silence_s
    try:
        while True:
            asked_at = anyio.current_time()
            with anyio.fail_after(patience_s):
                chunk = await anext(chunks)
            pending += chunk
            earned_s = len(chunk) / min_bytes_per_s - (anyio.current_time() - asked_at)
            patience_s = min(silence_s, patience_s + earned_s)
            if len(pending) >= _WRITE_BYTES:
                await run_sync(file.write, bytes(pending))
                pending.clear()
    except StopAsyncIteration:
        await run_sync(file.write, bytes(pending))
        await run_sync(file.seek, 0)
