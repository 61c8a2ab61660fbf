"""Both clients over real connections: what streams, what is uploaded, and every other call."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from synthrep_shared.client import AsyncSynthRep, SynthRep
from synthrep_shared.errors import ServiceError
from synthrep_shared.messages import ProbeRequest, RunRequest

KEY = "a key of both services"  # as conftest has it
RUN = RunRequest(dataset="birds", max_steps=2)


@contextmanager
def serve(app: Any) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def urls(apps) -> Iterator[list[str]]:
    """Addresses of generator and trainer."""
    with ExitStack() as stack:
        yield [stack.enter_context(serve(apps[name])) for name in ("generator", "trainer")]


@pytest.fixture
def synthrep(urls) -> Iterator[SynthRep]:
    with SynthRep(*urls, api_key=KEY, retries=1) as client:
        yield client


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of labelled images, with splits."""
    for split in ("train", "test"):
        for class_name in ("cat", "dog"):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8)).save(stream, "JPEG")
            path = tmp_path / "pets" / split / class_name / "1.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(stream.getvalue())
    return tmp_path / "pets"


def test_a_data_set_is_read_by_webdataset_without_rejected_groups(synthrep, factory):
    batch = synthrep.submit("birds", ["a wren", "an owl"], images_per_prompt=2).id
    factory.generate(batch)
    pipeline = synthrep.to_webdataset("birds").decode("pil").to_tuple("jpg", "json")
    found = list(pipeline)
    assert [(facts["caption"], facts["image_index"]) for _, facts in found] == [
        ("a wren", 0), ("a wren", 1), ("an owl", 0), ("an owl", 1),
    ]  # fmt: skip
    assert {image.size for image, _ in found} == {(factory.store_px, factory.store_px)}
    assert synthrep.reject(found[0][1]["gid"]).rejected
    assert [facts["caption"] for _, facts in pipeline] == ["an owl"] * 2


def test_the_generator_tells_what_happens(synthrep):
    events = synthrep.events()
    event = next(events)
    events.close()
    assert (event.name, event.data.name, event.data.state) == ("worker", "w0", "idle")


def test_labelled_sets_are_added(synthrep, pets):
    added = synthrep.add_probe_dataset("mine", pets)
    assert (added.classes, added.splits) == (["cat", "dog"], ["train", "test"])
    assert synthrep.link_probe_dataset("linked", str(pets)).splits == ["train", "test"]
    assert {"mine", "linked"} <= {s["name"] for s in synthrep.probe_datasets()}
    with pytest.raises(ServiceError, match="409"):
        synthrep.add_probe_dataset("mine", pets)


def test_the_asynchronous_client_makes_batches_and_reads_them(urls, factory):
    async def talk() -> None:
        async with AsyncSynthRep(*urls, api_key=KEY, retries=1) as client:
            batch = (await client.submit("birds", ["a wren"], images_per_prompt=2)).id
            states = [(await client.control(batch, verb)).state for verb in ("pause", "resume")]
            assert states == ["paused", "queued"]
            await asyncio.to_thread(factory.generate, batch)
            assert [b async for b in client.batches("birds")] == [await client.batch(batch)]
            assert [f async for f in client.failures(batch)] == []
            assert [d async for d in client.datasets()] == [await client.dataset("birds")]
            (shard,) = [shard async for shard in client.shards("birds")]
            (record,) = [record async for record in client.records("birds")]
            assert record["name"] == shard.name
            data = await client.shard_bytes("birds", shard.name)
            assert len(data) == shard.bytes
            assert await client.shard_bytes("birds", shard.name, start=5, num_bytes=4) == data[5:9]
            assert await client.shard_bytes("birds", shard.name, start=10**9, num_bytes=4) == b""
            gid = record["groups"][0]["gid"]
            assert (await client.group(gid)).images == 2
            assert (await client.image_bytes(gid, 1))[:2] == b"\xff\xd8"
            assert (await client.reject(gid)).rejected
            events = client.events()
            assert (await anext(events)).name == "worker"
            await events.aclose()

    asyncio.run(talk())


def test_the_asynchronous_client_trains_and_probes(urls, place, pets):
    async def talk() -> None:
        async with AsyncSynthRep(*urls, api_key=KEY, retries=1) as client:
            run = (await client.train(RUN)).id
            assert [r async for r in client.runs()] == [await client.run(run)]
            assert (await client.control_run(run, "stop")).state in ("paused", "cancelled")
            assert [event.is_last async for event in client.run_events(run)] == [True]
            assert [m async for m in client.metrics(run)] == []
            assert [c async for c in client.checkpoints(run)] == []
            assert (await client.add_probe_dataset("mine", pets)).classes == ["cat", "dog"]
            assert (await client.link_probe_dataset("linked", str(pets))).name == "linked"
            assert "mine" in {s["name"] for s in await client.probe_datasets()}
            probe = await client.start_probe(ProbeRequest(run_id=run, dataset="mine"))
            assert (await client.probe(probe.id)).dataset == "mine"
            with pytest.raises(ServiceError, match="404"):
                await client.comparison("none")
            answer = await client.request("GET", f"{client.trainer_url}/healthz")
            assert answer == {"status": "ok"}

    asyncio.run(talk())
