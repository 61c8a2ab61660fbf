from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.intake import IntakeReader
from synthrep_generator.queues import WorkerView, WorkQueue
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.storage import DatasetPaths

REQUEST = {"dataset": "pets", "prompts": ["a red  dog", "a cat"], "images_per_prompt": 2}


def submit(client, headers=None, **changes):
    return client.post("/v1/batches", json={**REQUEST, **changes}, headers=headers)


def walk(client, path, **params):
    """All items of a list, page by page."""
    items, cursor = [], None
    while True:
        page = client.get(path, params=params | ({"cursor": cursor} if cursor else {})).json()
        items += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return items


def test_api_does_not_import_torch():
    code = "import sys, synthrep_generator.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_accepted_batch_is_durable_with_the_defaults_of_its_model(client, root, backlog):
    answer = submit(client, seed=7, priority=2)
    assert answer.status_code == 202
    body = answer.json()
    assert body["prompts_accepted"] == 2
    assert answer.headers["location"] == body["links"]["self"]
    reader = IntakeReader(DatasetPaths(root, "pets"), body["id"])
    assert reader.prompts(0, 9) == ["a red dog", "a cat"]
    header = reader.header
    assert (header.num_prompts, header.priority, header.settings.seed) == (2, 2, 7)
    tiny = GeneratorSettings().models["tiny"]
    for name in ("guidance_scale", "num_inference_steps", "scheduler"):
        assert getattr(header.settings, name) == getattr(tiny, name)
    assert backlog.nudges == 1
    batch = client.get(body["links"]["self"]).json()
    assert (batch["state"], batch["prompts"]["queued"]) == ("queued", 2)
    assert client.get(body["links"]["shards"]).status_code == 200


def test_gate_is_kept_or_refused_with_what_to_configure(client, root):
    answer = submit(client, quality_gate={"max_attempts": 2})
    header = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"]).header
    assert header.settings.quality_gate.model_dump() == {
        "blank": True, "duplicates": True, "safety": False, "min_clip_score": None,
        "max_attempts": 2,
    }  # fmt: skip
    for gate, needed in [({"safety": True}, "SAFETY"), ({"min_clip_score": 0.2}, "CLIP_PATH")]:
        refused = submit(client, quality_gate=gate)
        assert refused.status_code == 422
        assert needed in refused.json()["detail"]
    for gate in [{"max_attempts": 0}, {"min_clip_score": 2}, {"nsfw": True}, "on"]:
        assert submit(client, quality_gate=gate).status_code == 422


def test_mixture_is_complete_when_it_is_durable(client, root):
    mixture = [{"guidance_scale": 1.5, "weight": 3}, {"scheduler": "euler"}]
    answer = submit(client, mixture=mixture, num_inference_steps=7)
    assert answer.status_code == 202
    header = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"]).header
    tiny = GeneratorSettings().models["tiny"]
    assert [component.model_dump() for component in header.settings.mixture] == [
        {"model": "tiny", "guidance_scale": 1.5, "num_inference_steps": 7,
         "scheduler": tiny.scheduler, "weight": 3.0},
        {"model": "tiny", "guidance_scale": tiny.guidance_scale, "num_inference_steps": 7,
         "scheduler": "euler", "weight": 1.0},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "mixture", [[{"model": "absent"}, {}], [{"weight": 0}], [{"prompts": 1}], [{}] * 17, {}, "tiny"]
)
def test_mixture_that_cannot_be_made_is_refused(client, mixture):
    assert submit(client, mixture=mixture).status_code == 422


def test_a_model_of_the_catalogue_that_is_not_here_is_refused_with_the_command(
    settings, backlog, tmp_path
):
    empty = settings.model_copy(update={"model_cache": tmp_path / "empty"})
    with TestClient(create_app(empty, backlog)) as client:
        detail = submit(client, model="sd15").json()["detail"]
    assert detail.startswith("the model is not here; known: tiny")
    assert "run `synthrep models pull sd15`" in detail


def test_ids_are_random_without_a_key_and_the_same_with_one(client):
    assert submit(client).json()["id"] != submit(client).json()["id"]
    key = {"idempotency-key": "k1"}
    first = submit(client, key)
    assert submit(client, key).json() == first.json()
    assert submit(client, {"idempotency-key": "k2"}).json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    "change", [{"prompts": ["a"]}, {"seed": 1}, {"priority": 1}, {"guidance_scale": 3.0}]
)
def test_key_with_another_body_is_a_conflict(client, change):
    key = {"idempotency-key": "k1"}
    submit(client, key)
    assert submit(client, key, **change).status_code == 409


def test_replay_is_answered_above_the_high_water_mark(root, backlog):
    settings = GeneratorSettings(root=root, high_water_prompts=3, reserve_bytes=0)
    with TestClient(create_app(settings, backlog)) as client:
        key = {"idempotency-key": "k1"}
        first = submit(client, key)
        refused = submit(client)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert submit(client, key).json() == first.json()
        assert len(list((root / "pets" / "intake").iterdir())) == 1
        client.post(f"/v1/batches/{first.json()['id']}/cancel")
        assert submit(client).status_code == 202


def test_full_disk_refuses_before_anything_is_visible(root, backlog):
    settings = GeneratorSettings(root=root, reserve_bytes=1 << 62)
    with TestClient(create_app(settings, backlog)) as client:
        refused = submit(client)
        assert refused.status_code == 507
        assert "retry-after" in refused.headers
        assert list(root.iterdir()) == []


def test_without_redis_files_answer_and_work_is_taken_in(client, backlog):
    backlog.is_up = False
    batch = submit(client)
    assert batch.status_code == 202
    links = batch.json()["links"]
    for path in (*links.values(), "/v1/batches", "/v1/datasets", "/v1/models", "/v1/scale"):
        assert client.get(path).status_code == 200, path
    for verb in ("pause", "resume", "cancel"):
        assert client.post(f"{links['self']}/{verb}").status_code == 200
    for path in ("/readyz", "/v1/queue", "/v1/workers"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200
    metrics = client.get("/metrics")
    assert "synthrep_generator_redis_up 0.0" in metrics.text
    (age,) = re.findall(r"^synthrep_generator_oldest_unfinished_seconds (.+)$", metrics.text, re.M)
    assert float(age) == 0.0  # all of it was cancelled


def test_figures_tell_what_quality_gates_refused(client, backlog):
    backlog.filtered = {"blank": 3, "caption": 2}
    text = client.get("/metrics").text
    assert 'synthrep_generator_filtered_images_total{check="blank"} 3.0' in text
    assert 'synthrep_generator_filtered_images_total{check="caption"} 2.0' in text


def test_life_of_a_batch_is_told_from_its_files(client, pets, backlog):
    header = pets.accept(["a", "b", "c", "d"])
    url = f"/v1/batches/{header.id}"
    pets.commit(header, {0: "a"})
    pets.fail(header, {1: "b"}, "too dark")
    backlog.prompts = {header.id: 1}
    batch = client.get(url).json()
    assert batch["state"] == "running"
    assert batch["prompts"] == {
        "accepted": 4, "queued": 1, "running": 1, "committed": 1, "failed": 1, "cancelled": 0,
    }  # fmt: skip
    assert batch["images_committed"] == 2
    failures = client.get(f"{url}/failures").json()["items"]
    assert failures == [{"index": 1, "prompt": "b", "reason": "too dark", "attempts": 4}]
    assert client.post(f"{url}/pause").json()["state"] == "paused"
    assert client.post(f"{url}/pause").json()["state"] == "paused"
    assert client.post(f"{url}/resume").json()["state"] == "running"
    assert client.post(f"{url}/cancel").json()["state"] == "cancelled"
    assert client.post(f"{url}/cancel").json()["prompts"]["cancelled"] == 2
    assert client.get("/v1/datasets/pets").json()["last_seq"] == 3


def test_state_is_told_without_a_change_of_threads_where_nothing_is_to_be_waited_for(
    client, pets, backlog, monkeypatch
):
    header = pets.accept(["a", "b"])
    path = f"/v1/batches/{header.id}"
    assert client.get(path).json()["prompts"]["committed"] == 0
    monkeypatch.setattr("synthrep_generator.routes_batches.run_sync", None)
    pets.commit(header, {0: "a"})
    assert client.get(path).json()["prompts"]["committed"] == 1


def test_lists_page_through_everything_once(client, pets):
    ids = [submit(client).json()["id"] for _ in range(7)]
    other = submit(client, dataset="cars").json()["id"]
    assert [b["id"] for b in walk(client, "/v1/batches", limit=3)] == [other, *reversed(ids)]
    assert [b["id"] for b in walk(client, "/v1/batches", dataset="cars", limit=3)] == [other]
    assert [d["name"] for d in walk(client, "/v1/datasets", limit=1)] == ["cars", "pets"]
    header = pets.accept([f"p{i}" for i in range(9)])
    for i in range(8):
        pets.commit(header, {i: f"p{i}"})
    pets.fail(header, {8: "p8"})
    shards = walk(client, "/v1/datasets/pets/shards", limit=3)
    assert [s["seq"] for s in shards] == list(range(1, 9))
    after = client.get("/v1/datasets/pets/shards", params={"after": 6}).json()
    assert [s["seq"] for s in after["items"]] == [7, 8]
    assert after["next_cursor"] is None
    assert len(walk(client, f"/v1/batches/{header.id}/failures", limit=1)) == 1
    assert [m["alias"] for m in walk(client, "/v1/models", limit=1)] == ["tiny"]


@pytest.mark.parametrize("scheduler", ["flow-match", "no such"])
def test_scheduler_that_does_not_fit_the_model_is_refused(client, scheduler):
    answer = submit(client, scheduler=scheduler)
    assert answer.status_code == 422
    assert client.get("/v1/batches").json()["items"] == []


def test_workers_queue_and_scale_add_up(client, backlog):
    backlog.live = [
        WorkerView("w2", "cpu", "busy", 3.0),
        WorkerView("w1", "cuda:0", "idle", 1.0),
    ]
    backlog.depth = 5
    submit(client, prompts=[f"p{i}" for i in range(1000)], images_per_prompt=2)
    workers = walk(client, "/v1/workers", limit=1)
    assert [w["name"] for w in workers] == ["w1", "w2"]
    queue = client.get("/v1/queue").json()
    assert queue == {"depth": 5, "running": 0, "backlog_s": 500.0}
    # 2,000 images are 13 jobs of 160, three for each worker
    assert client.get("/v1/scale").json() == {"value": 5}
    assert client.get("/readyz").status_code == 200


def test_keys_guard_everything_but_the_health_checks(root, backlog, pets):
    keys = ("first-key", "second-key")
    settings = GeneratorSettings(root=root, api_keys=tuple(map(SecretStr, keys)), reserve_bytes=0)
    with TestClient(create_app(settings, backlog)) as client:
        paths = client.get("/openapi.json", headers={"authorization": "Bearer first-key"}).json()
        for path, operations in paths["paths"].items():
            for method in operations:
                answer = client.request(method, path)
                is_open = path in ("/healthz", "/readyz")
                assert (answer.status_code == 401) is not is_open, path
        key = {"idempotency-key": "k"}
        ids = [submit(client, key | {"authorization": f"Bearer {k}"}).json()["id"] for k in keys]
        assert ids[0] != ids[1]
    owners = [IntakeReader(pets.paths, batch).header.owner for batch in ids]
    assert len(set(owners)) == 2
    assert not any(key in owner for key in keys for owner in owners)


def test_service_serves_and_stops_on_sigterm(root):
    environment = {
        **os.environ,
        "SYNTHREP_GENERATOR_ROOT": str(root),
        "SYNTHREP_GENERATOR_PORT": "0",
        "SYNTHREP_GENERATOR_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "synthrep_generator.api"], env=environment, stderr=subprocess.PIPE
    )
    events = []
    for line in process.stderr:
        events.append(json.loads(line))
        if "running on" in events[-1]["event"]:
            break
    address = re.search(r"http://[0-9.:]+", events[-1]["event"])[0]
    for host, status in (("theirs.example", 421), ("localhost", 200)):
        assert httpx.get(f"{address}/healthz", headers={"host": host}).status_code == status
    process.terminate()
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=20) == 0
    assert events[0]["event"] == "settings were read"
    assert events[0]["settings"]["redis_url"] == "**********"
    assert b"Traceback" not in rest
    assert Path(root).is_dir()


def test_description_resolves_and_promises_problems(client):
    document = client.get("/openapi.json").json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in schemas
    assert "HTTPValidationError" not in schemas
    assert "BatchRequest" in schemas
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["tags"]
            if path.startswith("/v1"):
                refusal = operation["responses"]["422"]["content"]
                assert list(refusal) == ["application/problem+json"]


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EROFS, 503)])
def test_storage_that_fails_refuses_the_batch(client, root, monkeypatch, number, status):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("synthrep_generator.admission.write_batch", fail)
    answer = submit(client)
    assert answer.status_code == status
    assert int(answer.headers["retry-after"]) > 0
    assert client.get("/v1/batches").json()["items"] == []
    monkeypatch.undo()
    assert submit(client).status_code == 202


def test_unexpected_error_is_a_problem_and_is_raised_for_the_log(settings, backlog, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("synthrep_generator.admission.write_batch", fail)
    app = create_app(settings, backlog)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = submit(client)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text


@pytest.mark.redis
def test_real_queue_is_nudged_and_reported(root, redis_url):
    settings = GeneratorSettings(
        root=root, redis_url=SecretStr(redis_url), queue="api-test", reserve_bytes=0
    )
    queue = WorkQueue(settings)
    queue.report_worker(WorkerView("w1", "cpu", "idle", 2.5), ttl_s=60)
    with TestClient(create_app(settings)) as client:
        assert submit(client).status_code == 202
        assert queue.wait_for_nudge(1.0)
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/queue").json() == {"depth": 0, "running": 0, "backlog_s": 1.6}
        assert walk(client, "/v1/workers") == [
            {"name": "w1", "device": "cpu", "state": "idle", "images_per_s": 2.5}
        ]
