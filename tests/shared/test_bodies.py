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


def test_a_body_that_drips_is_given_up():
    came = 0

    async def drips():
        nonlocal came
        for _ in range(2000):
            await anyio.sleep(0.001)
            came += 1
            yield b"x"

    async def run():
        await spool_body(drips(), io.BytesIO(), silence_s=0.2, min_bytes_per_s=1e6)

    with pytest.raises(TimeoutError):
        anyio.run(run)
    assert came > 1, "it was not silent"


def test_a_body_of_the_least_speed_may_take_any_time():
    async def run():
        slow = chunks(*[b"xx"] * 100)

        async def paced():
            async for chunk in slow:
                await anyio.sleep(0.001)
                yield chunk

        await spool_body(paced(), file, silence_s=60.0, min_bytes_per_s=1e-3)

    file = io.BytesIO()
    anyio.run(run)
    assert len(file.getvalue()) == 200


def test_a_full_disk_is_the_callers_to_tell():
    class FullDisk(io.BytesIO):
        def write(self, _):
            raise OSError(28, "no space left on device")

    async def run():
        await spool_body(chunks(b"one"), FullDisk(), silence_s=5.0)

    with pytest.raises(OSError, match="no space"):
        anyio.run(run)
