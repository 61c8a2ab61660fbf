"""Bodies go to disk as they come."""

from __future__ import annotations

import io

import anyio
import pytest

from synthrep_shared.bodies import spool_body


async def chunks(*parts, stall=False):
    for part in parts:
        yield part
    if stall:
        await anyio.sleep_forever()


@pytest.mark.parametrize(
    "parts", [(), (b"",), (b"one", b"", b"two"), (b"x" * (1 << 20), b"y", b"z" * (3 << 20), b"!")]
)
def test_a_body_is_on_disk_whole_and_ready_to_be_read(parts):
    file = io.BytesIO()

    async def run():
        await spool_body(chunks(*parts), file, silence_s=5.0)

    anyio.run(run)
    assert file.tell() == 0
    assert file.read() == b"".join(parts)


def test_a_body_that_stops_coming_is_given_up():
    async def run():
        await spool_body(chunks(b"one", stall=True), io.BytesIO(), silence_s=0.02)

    with pytest.raises(TimeoutError):
        anyio.run(run)


def test_a_full_disk_is_the_callers_to_tell():
    class FullDisk(io.BytesIO):
        def write(self, _):
            raise OSError(28, "no space left on device")

    async def run():
        await spool_body(chunks(b"one"), FullDisk(), silence_s=5.0)

    with pytest.raises(OSError, match="no space"):
        anyio.run(run)
