"""The client speaks to both services in one process: requests are taken, answers fit the models."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

import synthrep_shared.client_calls
from synthrep_shared import messages
from synthrep_shared.client import AsyncSynthRep, SynthRep
from synthrep_shared.commit_log import CommitRecord, read_log
from synthrep_shared.errors import ServiceError
from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer.checkpoint_folders import Manifest, publish_checkpoint
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.records import Status
from synthrep_trainer.runs import Workplace

GENERATOR, TRAINER = "http://generator", "http://trainer"
KEY = "a key of both services"  # as conftest has it
PROMPTS = ["a robin", "a wren [fake:refuse]", "a crow", "a gull [fake:refuse]"]


class InProcess(httpx.BaseTransport):
    """Answers by the app whose name is the host."""

    def __init__(self, clients: dict[str, TestClient]) -> None:
        self._clients = clients

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._clients[request.url.host].request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


class AsyncInProcess(httpx.AsyncBaseTransport):
    """The same for the asynchronous client, through httpx's own ASGI transport."""

    def __init__(self, apps: dict[str, Any]) -> None:
        self._transports = {host: httpx.ASGITransport(app) for host, app in apps.items()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._transports[request.url.host].handle_async_request(request)


@pytest.fixture
def transport(apps: dict[str, Any]) -> Iterator[InProcess]:
    with TestClient(apps["generator"]) as generator, TestClient(apps["trainer"]) as trainer:
        yield InProcess({"generator": generator, "trainer": trainer})


@pytest.fixture
def synthrep(transport: InProcess) -> Iterator[SynthRep]:
    with SynthRep(GENERATOR, TRAINER, api_key=KEY, retries=0, transport=transport) as client:
        yield client


@pytest.fixture(params=[1, 100])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Items that the client asks for at a time, so that cursors go to and fro as well."""
    monkeypatch.setattr(synthrep_shared.client_calls.Calls, "page_items", request.param)
    return int(request.param)


def train_some(place: Workplace, run_id: str, steps: int) -> None:
    """What a train process leaves: metrics, and a checkpoint of the last step."""
    folder = place.run(run_id)
    assert folder is not None
    writer = MetricsWriter(folder.metrics, step=0)
    for step in range(1, steps + 1):
        writer.write(
            StepMetrics(
                step=step, time=datetime.now(UTC), loss=2.5 - 0.1 * step, lr=1e-3,
                gradient_norm=1.0, effective_rank=3.0, images_seen=256 * step, images_per_s=90.0,
                wait_s=0.1, images_committed=100, generated_per_trained=0.2, shards_quarantined=0,
            )
        )  # fmt: skip
    writer.close()
    for step in (1, steps):
        manifest = Manifest(step=step, created_at=datetime.now(UTC), files={})
        publish_checkpoint(folder.checkpoints, {"state": b""}, manifest)


def test_batches_datasets_and_shards(synthrep, factory, page):
    accepted = synthrep.submit(
        "birds", PROMPTS, images_per_prompt=2, seed=3, guidance_scale=1.5, priority=1
    )
    assert accepted.prompts_accepted == 4
    assert synthrep.batch(accepted.id).prompts.queued == 4
    factory.generate(accepted.id)
    later = synthrep.submit("birds", ["an owl"], idempotency_key="k")
    assert synthrep.submit("birds", ["an owl"], idempotency_key="k") == later

    batch = synthrep.batch(accepted.id)
    assert (batch.state, batch.images_committed) == ("completed", 4)
    assert (batch.prompts.committed, batch.prompts.failed) == (2, 2)
    assert [b.id for b in synthrep.batches()] == [later.id, accepted.id]
    failures = list(synthrep.failures(accepted.id))
    assert [(f.index, f.prompt) for f in failures] == [(1, PROMPTS[1]), (3, PROMPTS[3])]

    factory.generate(later.id)
    (dataset,) = synthrep.datasets()
    assert dataset == synthrep.dataset("birds")
    assert (dataset.shards, dataset.groups, dataset.images) == (2, 3, 14)
    shards = list(synthrep.shards("birds"))
    assert [(s.groups, s.images) for s in shards] == [(2, 4), (1, 10)]
    assert list(synthrep.shards("birds", after=shards[0].seq)) == shards[1:]
    for shard in shards:
        data = synthrep.shard_bytes("birds", shard.name)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.sha256, shard.bytes)
        part = synthrep.shard_bytes("birds", shard.name, start=len(data) - 3, num_bytes=512)
        assert part == data[-3:]
        assert synthrep.shard_bytes("birds", shard.name, start=len(data), num_bytes=512) == b""
    records = [CommitRecord.model_validate(r) for r in synthrep.records("birds", after=1)]
    assert records == list(read_log(factory.paths.log, after=1))


def test_a_batch_is_controlled(synthrep):
    batch = synthrep.submit("birds", ["an owl"]).id
    states = [synthrep.control(batch, verb).state for verb in ("pause", "resume", "cancel")]
    assert states == ["paused", "queued", "cancelled"]


def test_runs_metrics_and_checkpoints(synthrep, place, page):
    run = synthrep.train(RunRequest(dataset="birds", max_images=5120, captions_per_batch=64))
    assert (run.state, run.step, run.max_steps) == ("queued", 0, 20)
    train_some(place, run.id, 3)
    other = synthrep.train(RunRequest(dataset="birds", max_steps=7, objective="simclr"))
    assert sorted(r.id for r in synthrep.runs()) == sorted([other.id, run.id])
    found = synthrep.run(run.id)
    assert (found.step, found.images_seen, found.loss) == (3, 768, 2.2)
    assert [m["step"] for m in synthrep.metrics(run.id)] == [1, 2, 3]
    assert [m["step"] for m in synthrep.metrics(run.id, after=1)] == [2, 3]
    assert [c.step for c in synthrep.checkpoints(run.id)] == [1, 3]
    assert synthrep.control_run(run.id, "stop").state == "paused"
    assert synthrep.control_run(run.id, "resume").state == "queued"


def test_a_run_tells_its_numbers_and_its_end(synthrep, place):
    run = synthrep.train(RunRequest(dataset="birds", max_steps=3)).id
    train_some(place, run, 3)
    synthrep.control_run(run, "stop")
    *numbers, end = synthrep.run_events(run)
    assert [(e.name, e.data["step"], e.id) for e in numbers] == [
        ("metrics", step, str(step)) for step in (1, 2, 3)
    ]
    assert (end.data.id, end.data.state) == (run, "paused")
    assert [e.name for e in synthrep.run_events(run, last_event_id="2")] == ["metrics", "run"]


def test_probes_and_labelled_sets(synthrep, place):
    run = synthrep.train(RunRequest(dataset="birds", max_steps=3)).id
    train_some(place, run, 3)
    (first, *_) = synthrep.checkpoints(run)
    sets = [messages.ProbeSetView(**s) for s in synthrep.probe_datasets()]
    name = sets[0].name
    requests = [
        ProbeRequest(run_id=run, dataset=name),
        ProbeRequest(checkpoint=first.path, dataset=name, protocol="knn"),
    ]
    views = [synthrep.start_probe(request) for request in requests]
    assert [view.state for view in views] == ["queued", "queued"]
    assert [synthrep.probe(view.id) for view in views] == views
    listed = synthrep.request("GET", f"{TRAINER}/v1/probes")
    parsed = messages.Page[messages.ProbeView].model_validate(listed)
    assert {view.id for view in parsed.items} == {view.id for view in views}
    folder = place.probe(views[0].id)
    assert folder is not None
    folder.write_status(Status(state="failed", error="no such file"))
    assert synthrep.probe(views[0].id).error == "no such file"


def test_the_table_of_a_comparison_is_read(synthrep, place):
    folder = place.root / "comparisons"
    folder.mkdir()
    report = {"id": "tiny", "rows": [], "summary": [], "statement": ["a draw"]}
    (folder / "tiny.json").write_text(json.dumps(report))
    assert list(synthrep.comparison("tiny").statement) == ["a draw"]


def test_models_workers_queue_and_groups_fit_the_models(synthrep, factory):
    batch = synthrep.submit("birds", ["an owl"], images_per_prompt=2).id
    factory.generate(batch)
    pages = {"models": messages.ModelView, "workers": messages.WorkerView}
    for name, model in pages.items():
        answer = synthrep.request("GET", f"{GENERATOR}/v1/{name}")
        assert len(messages.Page[model].model_validate(answer).items) == 1
    for name, view in {"queue": messages.QueueView, "scale": messages.ScaleView}.items():
        view.model_validate(synthrep.request("GET", f"{GENERATOR}/v1/{name}"))
    ((group,),) = [[ref.gid for ref in record.groups] for record in read_log(factory.paths.log)]
    found = synthrep.group(group)
    assert (found.gid, found.images, len(found.samples)) == (group, 2, 2)
    images = [synthrep.image_bytes(group, k) for k in range(2)]
    assert [image[:2] for image in images] == [b"\xff\xd8"] * 2
    rejected = synthrep.request("POST", f"{GENERATOR}/v1/groups/{group}/reject")
    assert messages.GroupView.model_validate(rejected).rejected
    assert synthrep.dataset("birds").rejected == 1
    for url in (GENERATOR, TRAINER):
        messages.HealthView.model_validate(synthrep.request("GET", f"{url}/readyz"))


ANSWERS: list[tuple[str, type[BaseModel]]] = [
    ("/v1/batches", messages.BatchView),
    ("/v1/datasets", messages.DatasetView),
    ("/v1/datasets/birds/shards", messages.ShardView),
    ("/v1/runs", messages.RunView),
    ("/v1/probe-datasets", messages.ProbeSetView),
    ("/v1/probes", messages.ProbeView),
    ("/v1/models", messages.ModelView),
    ("/v1/workers", messages.WorkerView),
]


def test_services_send_exactly_the_fields_of_the_models(synthrep, factory):
    """A client ignores fields that it does not know, so one that is misspelt would go unseen."""
    factory.generate(synthrep.submit("birds", ["an owl"]).id)
    run = synthrep.train(RunRequest(dataset="birds", max_steps=3)).id
    synthrep.start_probe(ProbeRequest(run_id=run, dataset=synthrep.probe_datasets()[0]["name"]))
    for path, model in ANSWERS:
        host = TRAINER if path.startswith(("/v1/runs", "/v1/probe")) else GENERATOR
        items = synthrep.request("GET", host + path)["items"]
        assert items, path
        assert [set(item) for item in items] == [set(model.model_fields)] * len(items), path


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (lambda s: s.batch("0" * 32), 404, "no such batch"),
        (lambda s: s.submit("Birds!", ["a"]), 422, "dataset"),
        (lambda s: s.submit("birds", ["a"], model="huge"), 422, "model"),
        (lambda s: s.run("20260101-000000-000000000000"), 404, "no such run"),
        (
            lambda s: s.start_probe(ProbeRequest(run_id="x", dataset="no-such-set")),
            422,
            "labelled set",
        ),
    ],
)
def test_refusals_of_both_services_become_one_sentence(synthrep, call, status, words):
    with pytest.raises(ServiceError) as raised:
        call(synthrep)
    assert raised.value.status == status
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", [GENERATOR, TRAINER])
def test_a_wrong_key_is_refused_by_both_services(transport, url):
    path = "/v1/batches" if url == GENERATOR else "/v1/runs"
    with (
        SynthRep(GENERATOR, TRAINER, api_key="another", transport=transport) as client,
        pytest.raises(ServiceError) as raised,
    ):
        client.request("GET", url + path)
    assert raised.value.status == 401


def test_the_asynchronous_client_speaks_to_both_services(apps, factory, place, page):
    async def talk() -> None:
        transport = AsyncInProcess(apps)
        async with AsyncSynthRep(
            GENERATOR, TRAINER, api_key=KEY, retries=0, transport=transport
        ) as client:
            first, second = await asyncio.gather(
                *(client.submit("birds", [prompt], images_per_prompt=2) for prompt in ("a", "b"))
            )
            for batch in (first, second):
                await asyncio.to_thread(factory.generate, batch.id)
                assert (await client.batch(batch.id)).state == "completed"
            shards = [shard async for shard in client.shards("birds")]
            assert [shard.images for shard in shards] == [2, 2]
            assert [s async for s in client.shards("birds", after=1)] == shards[1:]
            run = place.submit_run(RunRequest(dataset="birds", max_steps=2)).id
            assert (await client.run(run)).max_steps == 2
            probe = place.submit_probe(ProbeRequest(run_id=run, dataset="digits")).id
            assert (await client.probe(probe)).state == "queued"
            with pytest.raises(ServiceError, match="no such batch"):
                await client.batch("0" * 32)

    asyncio.run(talk())


def test_every_call_of_the_clients_is_made_here():
    """A method without a test here would be a promise that no service was held to."""
    text = "".join(f.read_text() for f in Path(__file__).parent.glob("test_rest*.py"))
    for kind, name in ((SynthRep, "synthrep"), (AsyncSynthRep, "client")):
        methods = {
            method
            for method, _ in inspect.getmembers(kind, inspect.isfunction)
            if not method.startswith("_") and method != "close"
        }
        assert {m for m in methods if f"{name}.{m}(" not in text} == set()
