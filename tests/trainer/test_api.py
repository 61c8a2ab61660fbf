"""The trainer's REST service, as the table of interfaces has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer import routes_runs
from synthrep_trainer.api import create_app, make_server
from synthrep_trainer.checkpoint_folders import Manifest, publish_checkpoint
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.records import Status
from synthrep_trainer.runs import RunFolder, Workplace, locked
from synthrep_trainer.settings import TrainerSettings

RUN = {"dataset": "birds", "max_steps": 30}


@pytest.fixture
def settings(tmp_path):
    return TrainerSettings(runs=tmp_path / "runs", root=tmp_path / "data", max_queued=5)


@pytest.fixture
def api(settings):
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def place(settings):
    return Workplace(settings.runs)


def train_some(folder, steps):
    writer = MetricsWriter(folder.metrics, step=0)
    for step in range(1, steps + 1):
        writer.write(
            StepMetrics(
                step=step,
                time=datetime.now(UTC),
                loss=2.5,
                lr=0.1,
                gradient_norm=1.0,
                effective_rank=3.0,
                images_seen=256 * step,
                images_per_s=90.0,
                wait_s=0.1,
                images_committed=100,
                generated_per_trained=0.2,
                shards_quarantined=0,
            )
        )
    writer.close()


def save(folder, step):
    manifest = Manifest(step=step, created_at=datetime.now(UTC), files={})
    publish_checkpoint(folder.checkpoints, {}, manifest)


def is_problem(response, status):
    return (
        response.status_code == status
        and response.headers["content-type"] == "application/problem+json"
        and response.json()["status"] == status
        and len(response.content) <= 4096
    )


def test_a_run_is_durable_once_it_is_accepted(api, place):
    response = api.post("/v1/runs", json=RUN)
    assert response.status_code == 202
    view = response.json()
    assert {view[k] for k in ("step", "images_seen")} == {0}
    assert {view[k] for k in ("loss", "generated_per_trained", "error")} == {None}
    assert (view["state"], view["max_steps"]) == ("queued", 30)
    assert place.run(view["id"]).record.request == RunRequest(**RUN)
    assert response.headers["location"] == f"/v1/runs/{view['id']}"


def test_a_run_shows_its_newest_step(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    train_some(folder, 3)
    view = api.get(f"/v1/runs/{folder.id}").json()
    assert (view["step"], view["images_seen"], view["loss"]) == (3, 768, 2.5)


def test_max_images_becomes_steps(api):
    view = api.post("/v1/runs", json={"dataset": "birds", "max_images": 1000}).json()
    assert view["max_steps"] == 4  # 64 captions, 4 images each
    simclr = {"dataset": "birds", "max_images": 1000, "objective": "simclr"}
    assert api.post("/v1/runs", json=simclr).json()["max_steps"] == 8  # 64 images, 2 crops each


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "../x"}, {"dataset": "Birds"}, {"max_steps": 0}, {"max_steps": "3"},
        {"max_steps": True}, {"max_images": 5}, {"max_steps": None}, {"lr": 0}, {"lr": "NaN"},
        {"objective": "magic"}, {"captions_per_batch": 1}, {"surprise": 1}, {"seed": -1},
        {"model": "m" * 101}, {"probe_every": 5}, {"probe_datasets": ["digits"]},
        {"probe_every": 5, "probe_datasets": ["../x"]},
        {"probe_every": 5, "probe_datasets": ["no_such_set"]},
        {"probe_every": 5, "probe_datasets": ["digits", "digits"]}, {"temperature": 1e999},
        {"max_steps": 10**9}, {"max_uses_per_image": 2**63}, {"min_fill_groups": 10**400},
        {"max_steps": None, "max_images": 2**53}, {"ema_decay": 1}, {"ema_final_decay": 0.99},
        {"text": {"width": 100, "heads": 3}}, {"synclr": {"crops": 3}}, {"precision": "fp16"},
        {"micro_batch_images": 0}, {"knn_every": 5, "knn_held_out": 1.0}, {"non_finite": "hope"},
    ],
)  # fmt: skip
def test_a_bad_run_is_refused_and_leaves_nothing(api, place, change):
    body = json.dumps(RUN | change)
    response = api.post("/v1/runs", content=body, headers={"content-type": "application/json"})
    assert is_problem(response, 422)
    assert place.runs() == []


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/probes"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"\\ud800"', b"[" * 20_000, b"\xff\xfe", b'{"a": NaN}']
)
def test_malformed_json_is_refused(api, path, body):
    headers = {"content-type": "application/json"}
    assert is_problem(api.post(path, content=body, headers=headers), 422)


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/probes"])
def test_other_bodies_are_refused(api, path):
    assert is_problem(api.post(path, content=b"x", headers={"content-type": "text/plain"}), 415)
    large = b" " * (65 << 10)
    headers = {"content-type": "application/json"}
    assert is_problem(api.post(path, content=large, headers=headers), 413)


@pytest.mark.parametrize(
    "run_id", ["x", "20260101-000000-000000-0123456789ab", "..%2f..", "a" * 300, "%00"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("POST", "/stop"), ("POST", "/resume"), ("GET", "/metrics"),
        ("GET", "/events"), ("GET", "/checkpoints"),
    ],
)  # fmt: skip
def test_an_unknown_run_is_a_problem(api, method, path, run_id):
    response = api.request(method, f"/v1/runs/{run_id}{path}")
    assert is_problem(response, response.status_code)
    assert response.status_code in (404, 422)


def test_stop_pauses_a_waiting_run_and_resume_queues_it(api):
    run = api.post("/v1/runs", json=RUN).json()
    for _ in range(2):
        assert api.post(f"/v1/runs/{run['id']}/stop").json()["state"] == "paused"
    for _ in range(2):
        assert api.post(f"/v1/runs/{run['id']}/resume").json()["state"] == "queued"


@pytest.mark.parametrize("state", ["completed", "failed"])
def test_an_ended_run_cannot_be_stopped(api, place, state):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    folder.write_status(Status(state=state, error="it broke"))
    assert is_problem(api.post(f"/v1/runs/{folder.id}/stop"), 409)
    resumed = api.post(f"/v1/runs/{folder.id}/resume")
    if state == "completed":
        assert is_problem(resumed, 409)
    else:
        assert (resumed.json()["state"], resumed.json()["error"]) == ("queued", None)


def test_a_failed_run_says_why(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    folder.write_status(Status(state="failed", error="NonFiniteLossError: nan at step 3"))
    view = api.get(f"/v1/runs/{folder.id}").json()
    assert (view["state"], view["error"]) == ("failed", "NonFiniteLossError: nan at step 3")


def test_a_running_run_whose_launcher_died_is_queued(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    folder.write_status(Status(state="running"))
    with locked(folder.lease):
        assert api.get(f"/v1/runs/{folder.id}").json()["state"] == "running"
    assert api.get(f"/v1/runs/{folder.id}").json()["state"] == "queued"


def test_metrics_come_in_pages_after_a_step(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    train_some(folder, 7)
    url = f"/v1/runs/{folder.id}/metrics"
    page = api.get(url, params={"after": 2, "limit": 3}).json()
    assert [item["step"] for item in page["items"]] == [3, 4, 5]
    rest = api.get(url, params={"after": 2, "limit": 3, "cursor": page["next_cursor"]}).json()
    assert ([item["step"] for item in rest["items"]], rest["next_cursor"]) == ([6, 7], None)


@pytest.mark.parametrize(
    "query",
    ["after=x", "after=-2", "limit=0", "limit=1001", "cursor=x", "cursor=-1", "cursor=" + "9" * 99],
)
@pytest.mark.parametrize("path", ["metrics", "checkpoints"])
def test_bad_pages_are_refused(api, path, query):
    run = api.post("/v1/runs", json=RUN).json()
    response = api.get(f"/v1/runs/{run['id']}/{path}?{query}")
    if path == "checkpoints" and query.startswith("after"):
        assert response.status_code == 200
    else:
        assert is_problem(response, 422)


def test_lists_come_newest_first_in_pages(api):
    ids = [api.post("/v1/runs", json=RUN | {"seed": k}).json()["id"] for k in range(4)]
    page = api.get("/v1/runs?limit=3").json()
    rest = api.get("/v1/runs", params={"limit": 3, "cursor": page["next_cursor"]}).json()
    assert [v["id"] for v in page["items"] + rest["items"]] == sorted(ids, reverse=True)
    assert rest["next_cursor"] is None
    assert is_problem(api.get("/v1/runs?cursor=x"), 422)


def test_events_end_with_the_run(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    train_some(folder, 3)
    folder.write_status(Status(state="completed"))
    response = api.get(f"/v1/runs/{folder.id}/events", headers={"last-event-id": "1"})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.splitlines()
    assert [line for line in lines if line.startswith("id:")] == ["id: 2", "id: 3"]
    data = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert [d.get("loss") for d in data] == [2.5, 2.5, 2.5]
    assert data[-1]["state"] == "completed"


def test_checkpoints_are_listed_and_can_be_probed(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    for step in (10, 20, 30):
        save(folder, step)
    url = f"/v1/runs/{folder.id}/checkpoints"
    page = api.get(url, params={"limit": 2}).json()
    rest = api.get(url, params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert [c["step"] for c in page["items"] + rest["items"]] == [10, 20, 30]
    probe = {"checkpoint": page["items"][1]["path"], "dataset": "digits"}
    accepted = api.post("/v1/probes", json=probe)
    assert accepted.status_code == 202
    assert accepted.json()["checkpoint"] == page["items"][1]["path"]


@pytest.mark.parametrize(
    "probe",
    [
        {"dataset": "digits"},
        {"run_id": "20260101-000000-000000-0123456789ab", "dataset": "digits"},
        {"checkpoint": "../../etc/passwd", "dataset": "digits"},
        {
            "checkpoint": "runs/20260101-000000-000000-0123456789ab/checkpoints/step-000000001",
            "dataset": "digits",
        },
        {"run_id": "x", "checkpoint": "y", "dataset": "digits"},
        {"run_id": "RUN", "dataset": "no-such-set"},
        {"run_id": "RUN", "dataset": "../digits"},
        {"run_id": "RUN", "dataset": "digits", "protocol": "magic"},
    ],
)
def test_a_bad_probe_is_refused(api, place, probe):
    run_id = api.post("/v1/runs", json=RUN).json()["id"]
    probe = {k: run_id if v == "RUN" else v for k, v in probe.items()}
    assert is_problem(api.post("/v1/probes", json=probe), 422)
    assert place.probes() == []


def test_a_completed_probe_shows_its_result(api, place):
    run_id = api.post("/v1/runs", json=RUN).json()["id"]
    probe = api.post("/v1/probes", json={"run_id": run_id, "dataset": "digits"}).json()
    folder = place.probe(probe["id"])
    folder.result.write_text(json.dumps({"metric": "accuracy", "value": 0.5, "ci95": [0.4, 0.6]}))
    folder.write_status(Status(state="completed"))
    view = api.get(f"/v1/probes/{probe['id']}").json()
    assert (view["state"], view["value"], view["ci95"]) == ("completed", 0.5, [0.4, 0.6])
    assert [v["id"] for v in api.get("/v1/probes").json()["items"]] == [probe["id"]]
    assert is_problem(api.get(f"/v1/probes/{probe['id']}/head"), 404)
    folder.head.write_bytes(b"tensors")
    assert api.get(f"/v1/probes/{probe['id']}/head").content == b"tensors"


def test_labelled_sets_are_listed_with_their_classes(api):
    items = api.get("/v1/probe-datasets").json()["items"]
    digits = next(item for item in items if item["name"] == "digits")
    assert digits["classes"] == [str(k) for k in range(10)]
    assert (digits["metric"], set(digits["splits"])) == ("accuracy", {"train", "test"})
    assert len(api.get("/v1/probe-datasets?limit=1").json()["items"]) == 1
    assert is_problem(api.delete("/v1/probe-datasets"), 405)


def test_too_many_waiting_requests_are_refused(api):
    for _ in range(5):
        run = api.post("/v1/runs", json=RUN).json()
        probe = {"run_id": run["id"], "dataset": "digits"}
        assert api.post("/v1/probes", json=probe).status_code == 202
    for path, body in (("/v1/runs", RUN), ("/v1/probes", probe)):
        response = api.post(path, json=body)
        assert is_problem(response, 429)
        assert response.headers["retry-after"].isdigit()


def test_captions_must_fit_the_processes(settings):
    several = settings.model_copy(update={"processes_per_run": 3})
    with TestClient(create_app(several)) as api:
        assert is_problem(api.post("/v1/runs", json=RUN), 422)


def test_health_needs_no_key_and_all_else_does(settings):
    guarded = settings.model_copy(update={"api_keys": ()})
    guarded = TrainerSettings(**guarded.model_dump() | {"api_keys": ("secret",)})
    with TestClient(create_app(guarded)) as api:
        schema = api.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
        for path, methods in schema["paths"].items():
            for method in methods:
                status = api.request(method, path.replace("{", "").replace("}", "")).status_code
                assert status == (200 if path in ("/healthz", "/readyz") else 401)


def test_numbers_for_prometheus(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    train_some(folder, 3)
    folder.write_status(Status(state="running"))
    with locked(folder.lease):
        text = api.get("/metrics").text
    assert 'synthrep_trainer_runs{state="running"} 1.0' in text
    assert f'synthrep_trainer_run_step{{run="{folder.id}"}} 3.0' in text


def test_a_loss_that_is_no_number_is_shown_as_such(api, place):
    folder = place.run(api.post("/v1/runs", json=RUN).json()["id"])
    train_some(folder, 3)
    lines = folder.metrics.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"loss": None, "is_skipped": True})
    folder.metrics.write_text("\n".join(lines) + "\n")
    folder.write_status(Status(state="running"))
    with locked(folder.lease):
        text = api.get("/metrics").text
    assert f'synthrep_trainer_run_loss{{run="{folder.id}"}} NaN' in text


def test_prometheus_sees_the_newest_value_of_each_probe(api, place):
    run_id = api.post("/v1/runs", json=RUN).json()["id"]
    request = ProbeRequest(run_id=run_id, dataset="digits", protocol="knn")
    for value in (0.5, 0.75):
        folder = place.submit_probe(request)
        folder.result.write_text(json.dumps({"metric": "accuracy", "value": value}))
        folder.write_status(Status(state="completed"))
    sample = f'synthrep_trainer_probe_value{{dataset="digits",protocol="knn",run="{run_id}"}} 0.75'
    assert sample in api.get("/metrics").text


def test_storage_that_fails_is_503(api, settings):
    (settings.runs / "runs").rmdir()
    (settings.runs / "runs").write_text("a file")
    response = api.post("/v1/runs", json=RUN)
    assert is_problem(response, 503)


def test_a_run_of_another_version_hides_no_other(api, place):
    odd, run = (place.run(api.post("/v1/runs", json=RUN).json()["id"]) for _ in range(2))
    (odd.path / "request.json").write_text("{}")
    assert [v["id"] for v in api.get("/v1/runs").json()["items"]] == [run.id]
    assert is_problem(api.get(f"/v1/runs/{odd.id}"), 503)
    assert api.get("/metrics").status_code == 200


def test_the_client_speaks_this_api(api, place):
    client = SynthRep("http://g", "", retries=0)
    client._http.close()
    client._http = api
    run = client.train(RunRequest(**RUN))
    folder = place.run(run.id)
    train_some(folder, 120)
    save(folder, 10)
    assert [m["step"] for m in client.metrics(run.id)] == list(range(1, 121))
    assert [c.step for c in client.checkpoints(run.id)] == [10]
    assert [r.id for r in client.runs()] == [run.id]
    assert client.control_run(run.id, "stop").state == "paused"
    probe = client.start_probe(ProbeRequest(run_id=run.id, dataset="digits"))
    assert client.probe(probe.id).state == "queued"
    assert "digits" in [s["name"] for s in client.probe_datasets()]


@pytest.mark.parametrize("module", ["api", "launcher"])
def test_neither_torch_nor_the_loop_is_imported(module):
    code = f"""
import sys, synthrep_trainer.{module}
heavy = {{"torch", "cv2", "timm", "safetensors", "synthrep_trainer.loop"}} & set(sys.modules)
raise SystemExit(f"imported: {{heavy}}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_service_ends_with_status_0_on_sigterm(settings):
    environment = os.environ | {
        "SYNTHREP_TRAINER_RUNS": str(settings.runs),
        "SYNTHREP_TRAINER_PORT": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "synthrep_trainer.api"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "running on" in line:
            break
    process.terminate()
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert "Traceback" not in rest


def test_streams_end_when_the_server_is_told_to(settings):
    server = make_server(settings)
    server.should_exit = True
    with TestClient(server.config.app, base_url="http://localhost") as api:
        run = api.post("/v1/runs", json=RUN).json()["id"]
        for path in (f"/v1/runs/{run}/events", "/page/events"):
            assert api.get(path).text == ""


def test_an_open_server_answers_under_no_name_that_is_not_its_own(settings):
    allowed = settings.model_copy(update={"allowed_hosts": ("mine.example",)})
    for host, status in (("theirs.example", 421), ("mine.example", 200), ("127.0.0.1:8001", 200)):
        api = TestClient(make_server(allowed).config.app, base_url=f"http://{host}")
        for path in ("/", "/page/parts/runs", "/v1/runs", "/healthz"):
            assert api.get(path).status_code == status, path


def test_a_source_must_be_allowed(api):
    body = {"source_url": "http://169.254.169.254/v1/datasets/birds", "max_steps": 1}
    answer = api.post("/v1/runs", json=body)
    assert answer.status_code == 422
    assert "allowed sources" in answer.json()["detail"]
    both = body | {"dataset": "birds"}
    assert api.post("/v1/runs", json=both).status_code == 422


def test_a_run_shows_how_many_shards_it_leaves_out(api, place):
    run = place.submit_run(RunRequest(dataset="birds", max_steps=1))
    assert api.get(f"/v1/runs/{run.id}").json()["shards_quarantined"] == 0
    (run.path / "quarantine").mkdir()
    (run.path / "quarantine" / "3.json").write_text("{}")
    assert api.get(f"/v1/runs/{run.id}").json()["shards_quarantined"] == 1


def test_only_a_running_run_says_what_it_waits_for(api, place):
    run = place.submit_run(RunRequest(**RUN))
    run.waiting.write_text("captions: 16 of 64 are there")
    run.write_status(Status(state="running"))
    url = f"/v1/runs/{run.id}"
    with locked(run.lease):
        assert api.get(url).json()["waiting_for"] == "captions: 16 of 64 are there"
    assert api.get(url).json()["waiting_for"] == ""


def test_events_tell_what_a_run_waits_for(api, place, monkeypatch):
    run = place.submit_run(RunRequest(**RUN))
    run.write_status(Status(state="running"))
    sleeps = iter([lambda: run.waiting.write_text("captions: 1 of 64 are there"), lambda: None,
                   lambda: run.write_status(Status(state="completed"))])  # fmt: skip

    async def pause(_):
        next(sleeps)()

    monkeypatch.setattr(routes_runs, "anyio", SimpleNamespace(sleep=pause))
    with locked(run.lease):
        lines = api.get(f"/v1/runs/{run.id}/events").text.splitlines()
    views = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    told = [(view["state"], view["waiting_for"]) for view in views]
    assert told == [
        ("running", ""), ("running", "captions: 1 of 64 are there"), ("completed", ""),
    ]  # fmt: skip


def test_a_resume_that_meets_its_run_being_put_down_is_not_lost(api, place, monkeypatch):
    run = place.submit_run(RunRequest(**RUN))
    with locked(run.lease):
        run.write_status(Status(state="running"))
        api.post(f"/v1/runs/{run.id}/stop")
        write_wanted = RunFolder.write_wanted

        def put_down_first(folder, wanted):
            run.write_status(Status(state="paused"))
            write_wanted(folder, wanted)

        monkeypatch.setattr(RunFolder, "write_wanted", put_down_first)
        assert api.post(f"/v1/runs/{run.id}/resume").json()["state"] == "queued"


def test_a_run_of_another_version_keeps_no_new_one_out(api, place):
    odd = place.submit_run(RunRequest(**RUN))
    (odd.path / "status.json").write_text('{"version": 2}')
    assert api.post("/v1/runs", json=RUN).status_code == 202
