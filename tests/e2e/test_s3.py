"""The whole generator over an object store, with real processes, one of which is killed."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.object_store import ObjectPath

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.s3]

FIRST, SECOND = 40, 30  # prompts
IMAGES = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def service(generator_stack: Callable[..., Any], store_root: ObjectPath) -> Iterator[Any]:
    """A stack over the store, with its API and reconciler running, and a client of the API."""
    port = free_port()
    stack = generator_stack(root=str(store_root), port=port, fake_delay_s=0.02)
    stack.start("reconciler")
    stack.start("api")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        stack.wait_for(lambda: answers(client))
        yield stack, client


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def counts(client: httpx.Client, batch: str) -> Counter[str]:
    prompts = client.get(f"/v1/batches/{batch}").raise_for_status().json()["prompts"]
    accepted = prompts.pop("accepted")
    assert accepted == sum(prompts.values())
    return Counter(prompts)


def submit_both(client: httpx.Client) -> list[str]:
    """One batch in a JSON body, one as an uploaded text."""
    body = {
        "dataset": "birds",
        "prompts": [f"bird {i}" for i in range(FIRST)],
        "images_per_prompt": IMAGES,
    }
    text = "\n".join(f"fish {i}" for i in range(SECOND))
    answers = [
        client.post("/v1/batches", json=body),
        client.post(
            f"/v1/batches/upload?dataset=birds&images_per_prompt={IMAGES}&priority=6",
            content=text,
            headers={"content-type": "text/plain"},
        ),
    ]
    return [answer.raise_for_status().json()["id"] for answer in answers]


@pytest.mark.timeout(240)
def test_batches_complete_over_the_store_though_a_worker_is_killed(
    service: Any, store: Any
) -> None:
    stack, client = service
    workers = [stack.start("worker") for _ in range(2)]
    batches = submit_both(client)
    stack.wait_for(lambda: counts(client, batches[0])["committed"] >= 8)
    workers[0].send_signal(signal.SIGKILL)
    stack.wait_for(lambda: counts(client, batches[0])["committed"] == FIRST, timeout_s=90)
    stack.wait_for(lambda: counts(client, batches[1])["committed"] == SECOND, timeout_s=90)
    check_shards(client, stack)
    gid = next(iter(stack.records()[0].groups)).gid
    assert client.post(f"/v1/groups/{gid}/reject").json()["rejected"] is True
    late = client.post("/v1/batches", json={"dataset": "birds", "prompts": ["x"] * 500}).json()[
        "id"
    ]
    assert client.post(f"/v1/batches/{late}/pause").json()["state"] == "paused"
    assert client.post(f"/v1/batches/{late}/cancel").json()["state"] == "cancelled"
    workers[1].send_signal(signal.SIGTERM)
    assert workers[1].wait(25) == 0
    decided = stack.decided()
    assert len(decided) == len(set(decided)) == FIRST + SECOND + counts(client, late)["committed"]
    assert [r.seq for r in stack.records()] == list(range(1, len(stack.records()) + 1))
    verify(stack, most_orphans=1)


def check_shards(client: httpx.Client, stack: Any) -> None:
    """Every shard comes over HTTP as it is in the store, whole and in ranges."""
    shards = client.get("/v1/datasets/birds/shards?limit=1000").json()["items"]
    assert sum(shard["groups"] for shard in shards) == FIRST + SECOND
    for shard in shards:
        data = (stack.paths.shards / shard["name"]).read_bytes()
        url = f"/v1/datasets/birds/shards/{shard['name']}"
        assert client.get(url).content == data
        half = len(data) // 2
        halves = (f"bytes=0-{half - 1}", f"bytes={half}-")
        ranges = [client.get(url, headers={"range": span}) for span in halves]
        assert [answer.status_code for answer in ranges] == [206, 206]
        assert b"".join(answer.content for answer in ranges) == data


def verify(stack: Any, *, most_orphans: int = 0) -> None:
    """What the command says of the data set; a killed worker may leave an orphan."""
    root = str(stack.settings.root)
    result = CliRunner().invoke(app, ["dataset", "verify", "birds", "--root", root, "--json"])
    report = json.loads(result.output)
    assert len(report["leftovers"]) <= most_orphans
    assert (result.exit_code, report["damage"]) == (len(report["leftovers"]), [])
    assert report["duplicated"] == report["undecided"] == report["failed"] == 0
    assert report["committed"] + report["cancelled"] == report["accepted"]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_nothing_is_lost_while_the_store_fails_a_tenth_of_all_requests(
    service: Any, store: Any
) -> None:
    stack, client = service
    stack.start("worker")
    stack.start("worker")
    store.hang_s, store.error_rate = 0.2, 0.1
    batches = []
    while len(batches) < 3:
        body = {"dataset": "birds", "prompts": [f"bird {i}" for i in range(16)]}
        answer = client.post("/v1/batches", json=body | {"images_per_prompt": IMAGES})
        assert answer.status_code in (202, 503)
        if answer.status_code == 202:
            batches.append(answer.json()["id"])
    started = time.monotonic()
    stack.wait_for(
        lambda: all(batch_is_done(client, batch) for batch in batches),
        timeout_s=180,
    )
    assert sum(store.faults.values()) > 0.05 * sum(store.requests.values())
    assert time.monotonic() - started < 180
    store.heal()
    decided = stack.decided()
    assert len(decided) == len(set(decided)) >= 48
    verify(stack)


def batch_is_done(client: httpx.Client, batch: str) -> bool:
    """Whether every prompt is committed, as far as the store lets the API say."""
    answer = client.get(f"/v1/batches/{batch}")
    assert answer.status_code in (200, 503)
    return answer.status_code == 200 and answer.json()["prompts"]["committed"] == 16


@pytest.mark.long
@pytest.mark.parametrize("place", ["shard-half-written", "file-linked", "line-written"])
def test_a_job_that_dies_around_its_commit_is_done_once(
    generator_stack: Callable[..., Any], store_root: ObjectPath, tmp_path: Path, place: str
) -> None:
    stack = generator_stack(root=str(store_root))
    marker = tmp_path / "marker"
    stack.accept([f"bird {i}" for i in range(12)])
    stack.start("reconciler")
    stack.start("worker", SYNTHREP_FAILPOINT=place, SYNTHREP_FAILPOINT_MARKER=str(marker))
    stack.wait_for(lambda: len(stack.decided()) == 12)
    assert marker.exists()
    assert len(set(stack.decided())) == 12
    assert {record.kind for record in stack.records()} == {"shard"}
    verify(stack)


@pytest.mark.long
def test_processes_refuse_a_store_that_could_lose_a_commit(
    generator_stack: Callable[..., Any], store: Any, store_root: ObjectPath
) -> None:
    store.is_conditional = False
    stack = generator_stack(root=str(store_root))
    for module in ("api", "reconciler", "worker"):
        assert stack.start(module).wait(60) == 1
    assert stack.output().count("ignores If-None-Match") >= 3
