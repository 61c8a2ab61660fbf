"""Who may do what: every route by scope, every thing by owner, every key within its quotas."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.intake import IntakeReader, list_batches, write_batch
from synthrep_generator.queues import WorkerView
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.samples import group_id
from synthrep_shared.storage import publish_file

# Written out, so that a route changes its scope here as well or not at all.
SCOPES = {
    "GET /healthz": None,
    "GET /metrics": "read",
    "GET /readyz": None,
    "GET /v1/batches": "read",
    "GET /v1/batches/{batch_id}": "read",
    "GET /v1/batches/{batch_id}/failures": "read",
    "GET /v1/datasets": "read",
    "GET /v1/datasets/{dataset}": "read",
    "GET /v1/datasets/{dataset}/records": "read",
    "GET /v1/datasets/{dataset}/shards": "read",
    "GET /v1/datasets/{dataset}/shards/{name}": "read",
    "GET /v1/events": "read",
    "GET /v1/groups/{gid}": "read",
    "GET /v1/groups/{gid}/images/{image_index}": "read",
    "GET /v1/models": "read",
    "GET /v1/queue": "read",
    "GET /v1/scale": "read",
    "GET /v1/workers": "read",
    "POST /v1/batches": "submit",
    "POST /v1/batches/upload": "submit",
    "POST /v1/batches/{batch_id}/cancel": "submit",
    "POST /v1/batches/{batch_id}/pause": "submit",
    "POST /v1/batches/{batch_id}/resume": "submit",
    "POST /v1/groups/{gid}/reject": "submit",
}
KEYS: dict[str, dict[str, Any]] = {
    "submit": {"scopes": ["submit"]},
    "read": {"scopes": ["read"], "datasets": ["*"]},
    "probe": {"scopes": ["probe"]},
    "admin": {"scopes": ["admin"]},
    "ann": {"scopes": ["submit", "read"]},
    "bob": {"scopes": ["submit", "read"]},
    "guest": {"scopes": ["submit", "read"], "datasets": ["pets", "public-*"]},
}
HEADERS = (b"x-content-type-options", b"x-frame-options", b"cache-control", b"referrer-policy")


@pytest.fixture
def make_api(root, backlog) -> Iterator[Callable[..., TestClient]]:
    """APIs over the same files; a key is its name with `-key` behind it."""
    with contextlib.ExitStack() as opened:

        def make(keys: dict[str, dict[str, Any]] = KEYS, **changes: Any) -> TestClient:
            entries = [{"name": name, "key": f"{name}-key", **rest} for name, rest in keys.items()]
            values = {"root": root, "reserve_bytes": 0, "api_keys": entries} | changes
            settings = GeneratorSettings.model_validate(values)
            return opened.enter_context(TestClient(create_app(settings, backlog)))

        yield make


def call(api: TestClient, key: str | None, method: str, path: str, **rest: Any) -> Any:
    headers = rest.pop("headers", {})
    if key is not None:
        headers = headers | {"authorization": f"Bearer {key}-key"}
    return api.request(method, path, headers=headers, **rest)


def submit(api: TestClient, key: str, *, dataset: str = "pets", count: int = 1, **rest: Any) -> Any:
    body = {"dataset": dataset, "prompts": [f"prompt {i}" for i in range(count)]}
    return call(api, key, "POST", "/v1/batches", json=body, **rest)


def operations(api: TestClient) -> dict[str, dict[str, Any]]:
    """`METHOD /path` of every route in the document, and what it says."""
    document = call(api, "admin", "GET", "/openapi.json").json()
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_needs_the_scope_that_the_document_names(make_api):
    found = operations(make_api())
    named = {route: op["security"][0]["key"][0] if op["security"] else None
             for route, op in found.items()}  # fmt: skip
    assert named == SCOPES
    for route, scope in SCOPES.items():
        assert ("403" in found[route]["responses"]) is (scope is not None), route


def test_a_route_opens_to_its_scope_and_to_no_other(make_api):
    api = make_api()
    for route, scope in SCOPES.items():
        method, path = route.split()
        for key in (None, "wrong", "submit", "read", "probe", "admin"):
            may_enter = key == "admin" or (key is not None and key == scope)
            if may_enter and path == "/v1/events":
                continue  # endless
            answer = call(api, key, method, re.sub("{.*?}", "0", path))
            status = answer.status_code
            if scope is None:
                assert status == 200, (route, key)
            elif key in (None, "wrong"):
                assert status == 401, (route, key)
            elif may_enter:
                assert status not in (401, 403), (route, key)
            else:
                assert status == 403, (route, key)
                assert answer.headers["content-type"] == "application/problem+json"


def test_a_route_that_says_nothing_opens_to_nobody(make_api):
    api = make_api()
    router = api.app._app._app  # behind the guard and the metrics
    router.add_api_route("/v1/new", lambda: None)
    assert call(api, "admin", "GET", "/v1/new").status_code == 403


@pytest.mark.parametrize("key", [None, "admin"])
def test_every_answer_carries_the_security_headers(make_api, key):
    api = make_api()
    for route in SCOPES.keys() - {"GET /v1/events"}:
        answer = call(api, key, *re.sub("{.*?}", "0", route).split())
        present = {name.lower() for name, _ in answer.headers.raw}
        assert set(HEADERS) <= present, route
        assert not present & {b"server", b"access-control-allow-origin"}, route


def test_what_another_owner_made_is_not_there(make_api, pets):
    api = make_api()
    batch = submit(api, "ann").json()["id"]
    header = IntakeReader(pets.paths, batch).header
    assert header.owner == "ann"
    shard = pets.commit(header, {0: "prompt 0"})
    gid = group_id("pets", batch, 0, "prompt 0",
                   header.settings.model_dump(mode="json", exclude_defaults=True))  # fmt: skip
    things = [
        ("GET", f"/v1/batches/{batch}"),
        ("GET", f"/v1/batches/{batch}/failures"),
        ("POST", f"/v1/batches/{batch}/pause"),
        ("POST", f"/v1/batches/{batch}/resume"),
        ("POST", f"/v1/batches/{batch}/cancel"),
        ("GET", "/v1/datasets/pets"),
        ("GET", "/v1/datasets/pets/shards"),
        ("GET", f"/v1/datasets/pets/shards/{shard.name}"),
        ("HEAD", f"/v1/datasets/pets/shards/{shard.name}"),
        ("GET", f"/v1/groups/{gid}"),
        ("GET", f"/v1/groups/{gid}/images/0"),
        ("POST", f"/v1/groups/{gid}/reject"),
    ]
    for method, path in things:
        assert call(api, "bob", method, path).status_code == 404, path
        assert call(api, "ann", method, path).status_code == 200, path
        assert call(api, "admin", method, path).status_code == 200, path
        absent = path.replace(batch, "0" * 32).replace("pets", "none").replace(gid, "0" * 32)
        if method != "HEAD":
            unknown, foreign = (call(api, "bob", method, p) for p in (absent, path))
            assert unknown.content == foreign.content, path
    for path in ("/v1/batches", "/v1/datasets"):
        assert call(api, "bob", "GET", path).json()["items"] == []
        assert len(call(api, "ann", "GET", path).json()["items"]) == 1
        assert len(call(api, "admin", "GET", path).json()["items"]) == 1


def test_a_key_reads_the_data_sets_that_it_names_and_handles_its_own_batches(make_api, pets):
    api = make_api()
    foreign = submit(api, "ann").json()["id"]
    submit(api, "ann", dataset="birds")
    header = IntakeReader(pets.paths, foreign).header
    pets.commit(header, {0: "prompt 0"})
    (ref,) = pets.refs(header, {0: "prompt 0"})
    for key, seen in (("guest", ["pets"]), ("read", ["birds", "pets"])):
        names = [d["name"] for d in call(api, key, "GET", "/v1/datasets").json()["items"]]
        assert names == seen
        assert call(api, key, "GET", f"/v1/groups/{ref.gid}").status_code == 200
        assert call(api, key, "GET", f"/v1/batches/{foreign}").status_code == 404
    assert call(api, "guest", "POST", f"/v1/groups/{ref.gid}/reject").status_code == 404
    assert submit(api, "guest").status_code == 202
    assert submit(api, "guest", dataset="public-1").status_code == 202


def test_nothing_is_written_to_what_a_key_does_not_reach(make_api, root):
    api = make_api()
    assert submit(api, "ann").status_code == 202
    upload = "/v1/batches/upload?dataset="
    text = {"headers": {"content-type": "text/plain"}, "content": b"a"}
    for key, dataset in (("bob", "pets"), ("guest", "birds")):
        assert submit(api, key, dataset=dataset).status_code == 403
        assert call(api, key, "POST", upload + dataset, **text).status_code == 403
    assert submit(api, "admin").status_code == 202
    assert [p.name for p in root.iterdir() if p.is_dir()] == ["pets"]


def test_figures_over_all_work_are_for_keys_of_all_data_sets(make_api):
    api = make_api()
    seen = [key for key in KEYS if call(api, key, "GET", "/metrics").is_success]
    assert seen == ["read", "admin"]


def test_keys_of_one_name_share_work_and_idempotency(make_api, pets):
    old = {"lab": {"scopes": ["submit", "read"]}}
    again = {"headers": {"idempotency-key": "k"}}
    first = submit(make_api(old), "lab", **again).json()["id"]
    entries = [{"name": "lab", "key": f"{k}-key", "scopes": ["submit", "read"]} for k in "ab"]
    api = make_api({}, api_keys=entries)
    assert submit(api, "a", **again).json()["id"] == submit(api, "b", **again).json()["id"] == first
    assert list_batches(pets.paths) == [first]


def quota(**limits: int) -> dict[str, dict[str, Any]]:
    return {"lab": {"scopes": ["submit", "read"], **limits}, "other": {"scopes": ["submit"]}}


def test_outstanding_prompts_of_an_owner_are_bounded(make_api, pets):
    keys = quota(max_outstanding_prompts=3)
    api = make_api(keys)
    batch = submit(api, "lab", count=2).json()["id"]
    refused = submit(api, "lab", count=2)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert submit(api, "other", dataset="birds", count=5).status_code == 202
    assert submit(api, "lab", count=1).status_code == 202
    assert submit(make_api(keys), "lab").status_code == 429, "a restart forgets no quota"
    pets.commit(IntakeReader(pets.paths, batch).header, {0: "prompt 0"})
    assert submit(api, "lab").status_code == 202
    assert len(list_batches(pets.paths)) == 3


def test_requests_at_once_pass_no_quota(make_api, monkeypatch):
    api = make_api(quota(max_outstanding_prompts=3))
    both_are_in = threading.Barrier(2)

    def write_late(*arguments: Any) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_are_in.wait(timeout=0.5)
        return write_batch(*arguments)

    monkeypatch.setattr("synthrep_generator.admission.write_batch", write_late)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: submit(api, "lab", count=2), range(2)))
    assert sorted(answer.status_code for answer in answers) == [202, 429]


@pytest.mark.parametrize("limit", ["max_outstanding_prompts", "max_prompts_per_day"])
def test_two_processes_give_one_quota(make_api, monkeypatch, limit):
    apis = [make_api(quota(**{limit: 3})) for _ in range(2)]
    both_are_counted = threading.Barrier(2)

    def publish_late(*arguments: Any) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_are_counted.wait(timeout=1)
        return publish_file(*arguments)

    monkeypatch.setattr("synthrep_generator.intake.publish_file", publish_late)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda api: submit(api, "lab", count=2), apis))
    assert sorted(answer.status_code for answer in answers) == [202, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0
    counted = [call(api, "lab", "GET", "/v1/batches").json()["items"] for api in apis]
    assert [len(items) for items in counted] == [1, 1]


def test_prompts_in_a_day_are_bounded_and_the_answer_says_when_to_come_back(make_api, pets):
    keys = quota(max_prompts_per_day=4)
    pets.created_at = datetime.now(UTC) - timedelta(hours=23)
    old, older = (pets.accept(["a"], batch=c * 32) for c in "12")
    for header, hours in ((old, 20), (older, 30)):
        file = pets.paths.intake / f"{header.id}.jsonl"
        moved = header.model_copy(
            update={"owner": "lab", "created_at": datetime.now(UTC) - timedelta(hours=hours)}
        )
        lines = file.read_text().splitlines()
        file.write_text("\n".join([moved.model_dump_json(), *lines[1:]]) + "\n")
    api = make_api(keys)
    assert submit(api, "lab", count=3).status_code == 202
    refused = submit(api, "lab")
    assert refused.status_code == 429
    assert 4 * 3600 - 60 < int(refused.headers["retry-after"]) <= 4 * 3600 + 1
    assert submit(api, "lab", count=2).headers["retry-after"] > refused.headers["retry-after"]


def test_an_upload_may_be_repeated_once_its_quota_is_used(make_api):
    api = make_api({"ann": {"scopes": ["submit"], "max_prompts_per_day": 2}})
    headers = {"content-type": "text/plain", "idempotency-key": "k"}
    path, body = "/v1/batches/upload?dataset=mine", b"a dog\na cat"
    first = call(api, "ann", "POST", path, content=body, headers=headers)
    again = call(api, "ann", "POST", path, content=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    other = call(api, "ann", "POST", path, content=b"a hen", headers=headers)
    assert other.status_code == 409
    fresh = headers | {"idempotency-key": "l"}
    assert call(api, "ann", "POST", path, content=body, headers=fresh).status_code == 429


def test_the_door_stays_shut_until_the_low_water(make_api, pets):
    api = make_api(high_water_prompts=4, low_water_fraction=0.5)
    batch = submit(api, "ann", count=4).json()["id"]
    assert submit(api, "ann").status_code == 429
    header = IntakeReader(pets.paths, batch).header
    pets.commit(header, {0: "prompt 0"})
    assert submit(api, "ann").status_code == 429, "three of four are left"
    pets.commit(header, {1: "prompt 1"})
    assert submit(api, "ann").status_code == 202
    assert submit(api, "ann").status_code == 202, "it was not shut anew"


def test_a_request_that_cannot_fit_shuts_the_door_for_nobody_else(make_api):
    api = make_api(high_water_prompts=2000, low_water_fraction=0.1)
    assert submit(api, "ann", count=500).status_code == 202
    upload = {"content": b"a dog\n" * 1600, "headers": {"content-type": "text/plain"}}
    assert call(api, "bob", "POST", "/v1/batches/upload?dataset=bobs", **upload).status_code == 429
    assert submit(api, "ann", count=600).status_code == 202
    assert submit(api, "ann", count=1000).status_code == 429, "one of usual size shuts it"
    assert submit(api, "ann").status_code == 429


@pytest.mark.parametrize(
    ("speeds", "seconds"), [((), "30"), ((2.5, 2.5), "100"), ((0.01,), "3600")]
)
def test_retry_after_is_what_the_workers_need(make_api, backlog, speeds, seconds):
    backlog.live = [WorkerView(f"w{i}", "cpu", "busy", speed) for i, speed in enumerate(speeds)]
    api = make_api(high_water_prompts=100, low_water_fraction=0.5)
    assert submit(api, "ann", count=100).status_code == 202
    # 50 prompts of 10 images are to go
    assert submit(api, "ann").headers["retry-after"] == seconds
