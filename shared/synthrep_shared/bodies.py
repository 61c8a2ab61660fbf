"""Request bodies that go to disk as they come: a slow client holds a file and no thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import IO

import anyio
from anyio.to_thread import run_sync

_WRITE_BYTES = 1 << 20


async def spool_body(chunks: AsyncIterator[bytes], file: IO[bytes], *, silence_s: float) -> None:
    """Write a body to `file` and go back to its start.

    Raises TimeoutError when no byte comes for `silence_s`, OSError when the disk is full, and what
    `chunks` raises.
    """
    pending = bytearray()
    try:
        while True:
            with anyio.fail_after(silence_s):
                pending += await anext(chunks)
            if len(pending) >= _WRITE_BYTES:
                await run_sync(file.write, bytes(pending))
                pending.clear()
    except StopAsyncIteration:
        await run_sync(file.write, bytes(pending))
        await run_sync(file.seek, 0)
