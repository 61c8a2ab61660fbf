"""Who may do what: every route by scope, every run and probe by owner, every request once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from synthrep_trainer.api import create_app
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings

# Written out, so that a route changes its scope here as well or not at all.
SCOPES = {
    "GET /healthz": None,
    "GET /metrics": "read",
    "GET /readyz": None,
    "GET /v1/probe-datasets": "read",
    "GET /v1/probes": "read",
    "GET /v1/probes/{probe_id}": "read",
    "GET /v1/probes/{probe_id}/head": "read",
    "GET /v1/comparisons/{comparison_id}": "read",
    "GET /v1/runs": "read",
    "GET /v1/runs/{run_id}": "read",
    "GET /v1/runs/{run_id}/checkpoints": "read",
    "GET /v1/runs/{run_id}/events": "read",
    "GET /v1/runs/{run_id}/metrics": "read",
    "POST /v1/probe-datasets": "probe",
    "POST /v1/probes": "probe",
    "POST /v1/runs": "submit",
    "POST /v1/runs/{run_id}/resume": "submit",
    "POST /v1/runs/{run_id}/stop": "submit",
}
KEYS: dict[str, dict[str, Any]] = {
    "submit": {"scopes": ["submit"]},
    "read": {"scopes": ["read"], "datasets": ["*"]},
    "probe": {"scopes": ["probe"]},
    "admin": {"scopes": ["admin"]},
    "ann": {"scopes": ["submit", "read", "probe"]},
    "bob": {"scopes": ["submit", "read", "probe"]},
    "guest": {"scopes": ["submit"], "datasets": ["birds-*"]},
}
HEADERS = (b"x-content-type-options", b"x-frame-options", b"cache-control", b"referrer-policy")
RUN = {"dataset": "birds", "max_steps": 30}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "runs")


@pytest.fixture
def api(tmp_path: Path, place: Workplace) -> Iterator[TestClient]:
    """The trainer's API; a key is its name with `-key` behind it."""
    keys = [{"name": name, "key": f"{name}-key", **rest} for name, rest in KEYS.items()]
    values = {"root": tmp_path / "data", "runs": place.root, "api_keys": keys, "max_queued": 5}
    with TestClient(create_app(TrainerSettings.model_validate(values))) as client:
        yield client


def call(api: TestClient, key: str | None, method: str, path: str, **rest: Any) -> Any:
    headers = rest.pop("headers", {})
    if key is not None:
        headers = headers | {"authorization": f"Bearer {key}-key"}
    return api.request(method, path, headers=headers, **rest)


def test_every_route_needs_the_scope_that_the_document_names(api):
    document = call(api, "admin", "GET", "/openapi.json").json()
    found = {
        f"{method.upper()} {path}": operation["security"][0]["key"][0]
        if operation["security"]
        else None
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert found == SCOPES
    for route, scope in SCOPES.items():
        method, path = route.split()
        responses = document["paths"][path][method.lower()]["responses"]
        assert ("403" in responses) is (scope is not None), route


def test_a_route_opens_to_its_scope_and_to_no_other(api):
    for route, scope in SCOPES.items():
        method, path = route.split()
        for key in (None, "wrong", "submit", "read", "probe", "admin"):
            may_enter = key == "admin" or (key is not None and key == scope)
            status = call(api, key, method, re.sub("{.*?}", "0", path)).status_code
            if scope is None:
                assert status == 200, (route, key)
            elif key in (None, "wrong"):
                assert status == 401, (route, key)
            elif may_enter:
                assert status not in (401, 403), (route, key)
            else:
                assert status == 403, (route, key)


@pytest.mark.parametrize("key", [None, "admin"])
def test_every_answer_carries_the_security_headers(api, key):
    for route in SCOPES:
        method, path = route.split()
        answer = call(api, key, method, re.sub("{.*?}", "0", path))
        present = {name.lower() for name, _ in answer.headers.raw}
        assert set(HEADERS) <= present, route
        assert not present & {b"server", b"access-control-allow-origin"}, route


def test_runs_and_probes_of_another_owner_are_not_there(api):
    run = call(api, "ann", "POST", "/v1/runs", json=RUN).json()["id"]
    body = {"run_id": run, "dataset": "digits"}
    probe = call(api, "ann", "POST", "/v1/probes", json=body).json()["id"]
    things = [
        ("GET", f"/v1/runs/{run}"),
        ("GET", f"/v1/runs/{run}/metrics"),
        ("GET", f"/v1/runs/{run}/checkpoints"),
        ("POST", f"/v1/runs/{run}/stop"),
        ("GET", f"/v1/runs/{run}/events"),
        ("POST", f"/v1/runs/{run}/resume"),
        ("GET", f"/v1/probes/{probe}"),
    ]
    for method, path in things:
        assert call(api, "bob", method, path).status_code == 404, path
        assert call(api, "ann", method, path).status_code == 200, path
        if "resume" not in path:
            assert call(api, "admin", method, path).status_code == 200, path
    for path in ("/v1/runs", "/v1/probes"):
        assert call(api, "bob", "GET", path).json()["items"] == []
        assert len(call(api, "ann", "GET", path).json()["items"]) == 1
        assert len(call(api, "admin", "GET", path).json()["items"]) == 1
    assert call(api, "bob", "POST", "/v1/probes", json=body).status_code == 422
    assert call(api, "admin", "POST", "/v1/probes", json=body).status_code == 202


def test_a_checkpoint_of_another_owner_is_not_there(api, place):
    run = call(api, "ann", "POST", "/v1/runs", json=RUN).json()["id"]
    path = f"runs/{run}/checkpoints/step-000000001"
    (place.root / path).mkdir(parents=True)
    (place.root / path / "manifest.json").touch()
    body = {"checkpoint": path, "dataset": "digits"}
    assert call(api, "bob", "POST", "/v1/probes", json=body).status_code == 422
    assert call(api, "ann", "POST", "/v1/probes", json=body).status_code == 202


def test_a_key_trains_on_the_data_sets_that_it_names(api):
    for dataset, status in (("birds-1", 202), ("birds", 403)):
        answer = call(api, "guest", "POST", "/v1/runs", json=RUN | {"dataset": dataset})
        assert answer.status_code == status


def test_figures_over_all_work_are_for_keys_of_all_data_sets(api):
    status = {key: call(api, key, "GET", "/metrics").status_code for key in KEYS}
    assert [key for key, code in status.items() if code == 200] == ["read", "admin"]


@pytest.mark.parametrize("kind", ["runs", "probes"])
def test_a_request_under_one_key_is_made_once(api, kind):
    run = call(api, "ann", "POST", "/v1/runs", json=RUN).json()["id"]
    body = RUN if kind == "runs" else {"run_id": run, "dataset": "digits"}
    key = {"idempotency-key": "again"}

    def post(who: str, body: dict[str, Any]) -> Any:
        return call(api, who, "POST", f"/v1/{kind}", json=body, headers=dict(key))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post("ann", body), range(4)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = body | ({"seed": 3} if kind == "runs" else {"protocol": "knn"})
    conflict = post("ann", other)
    assert conflict.status_code == 409
    assert conflict.headers["content-type"] == "application/problem+json"
    assert post("admin", body).json()["id"] != answers[0].json()["id"], "another owner's key"
    expected = 2 if kind == "probes" else 3
    assert len(call(api, "admin", "GET", f"/v1/{kind}").json()["items"]) == expected


def test_a_repetition_is_answered_where_new_requests_are_refused(api):
    key = {"idempotency-key": "again"}
    first = call(api, "ann", "POST", "/v1/runs", json=RUN, headers=key).json()
    while call(api, "ann", "POST", "/v1/runs", json=RUN).status_code == 202:
        pass
    again = call(api, "ann", "POST", "/v1/runs", json=RUN, headers=key)
    assert again.status_code == 202
    assert again.json() == first


def test_a_refused_request_leaves_its_key_free(api):
    key = {"idempotency-key": "again"}
    bad = RUN | {"probe_every": 1, "probe_datasets": ["none"]}
    assert call(api, "ann", "POST", "/v1/runs", json=bad, headers=key).status_code == 422
    assert call(api, "ann", "POST", "/v1/runs", json=RUN, headers=key).status_code == 202


def test_a_crash_between_claim_and_run_makes_the_same_run(api, place, monkeypatch):
    key = {"idempotency-key": "again"}
    with monkeypatch.context() as patch:
        patch.setattr("synthrep_trainer.runs._submit", _crash)
        with pytest.raises(RuntimeError):
            call(api, "ann", "POST", "/v1/runs", json=RUN, headers=key)
    (claim,) = (place.root / "claims" / "runs").iterdir()
    made = call(api, "ann", "POST", "/v1/runs", json=RUN, headers=key).json()["id"]
    assert made in claim.read_text()


def _crash(*_: object) -> None:
    raise RuntimeError("the process ends here")
