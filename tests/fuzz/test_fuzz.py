"""Both services under `FUZZ_CASES` requests that are made to break them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from synthrep_cli.stack import free_port
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeRequest, RunRequest
from tests.fuzz.abuse import Service, abuse, hold_open
from tests.fuzz.health import ask
from tests.fuzz.schemas import Fuzzer
from tests.fuzz.verdict import MAX_REFUSAL_BYTES, Verdict

pytestmark = [pytest.mark.redis, pytest.mark.e2e, pytest.mark.timeout(3000)]
CASES = int(os.environ.get("FUZZ_CASES") or 1000)
SEED = int(os.environ.get("FUZZ_SEED") or 1)
MAX_HEALTH_S = 0.2
SLOW_CONNECTIONS = 1000  # held open all the while, with half a header sent
ABUSED = 0.25  # part of the cases
KEY = "fuzz-key"
ROOT = Path(__file__).parents[2]
Make = Callable[..., Any]


@pytest.fixture
def services(generator_stack: Make, tmp_path: Path) -> Iterator[list[Service]]:
    """Both APIs as processes of their own, and the ids of what was made in them."""
    keys = [{"name": "fuzz", "key": KEY}]
    stack = generator_stack(port=free_port(), api_keys=keys, log_level="ERROR")
    trainer_port = free_port()
    environment = {
        "SYNTHREP_TRAINER_ROOT": str(stack.settings.root),
        "SYNTHREP_TRAINER_RUNS": str(tmp_path / "runs"),
        "SYNTHREP_TRAINER_PORT": str(trainer_port),
        "SYNTHREP_TRAINER_API_KEYS": json.dumps(keys),
        "SYNTHREP_TRAINER_MAX_QUEUED": "100000",
    }
    log = (tmp_path / "trainer.log").open("wb")
    trainer = subprocess.Popen(
        [sys.executable, "-m", "synthrep_trainer.api"], env=os.environ | environment, stderr=log
    )
    for part in ("api", "reconciler"):
        stack.start(part)
    worker = stack.start("worker")
    urls = [f"http://127.0.0.1:{port}" for port in (stack.settings.port, trainer_port)]
    try:
        stack.wait_for(lambda: all(ask(port) for port in (stack.settings.port, trainer_port)))
        with SynthRep(*urls, api_key=KEY, timeout_s=10) as client:
            batch = client.submit("birds", ["a", "b", "c [fake:refuse]"], images_per_prompt=2).id
            stack.wait_for(lambda: client.batch(batch).state == "completed")
            worker.kill()
            shard = next(client.shards("birds")).name
            run = client.train(RunRequest(dataset="birds", max_steps=5)).id
            probe = client.start_probe(ProbeRequest(run_id=run, dataset="digits")).id
        ids = [
            {
                "batch_id": [batch], "dataset": ["birds"], "name": [shard], "image_index": ["0"],
                "model": ["tiny"],
                "gid": [group.gid for record in stack.records() for group in record.groups],
            },
            {"run_id": [run], "probe_id": [probe], "dataset": ["digits"]},
        ]  # fmt: skip
        headers = {"authorization": f"Bearer {KEY}"}
        paths = [
            list(httpx.get(f"{u}/openapi.json", headers=headers).json()["paths"]) for u in urls
        ]
        ports = (stack.settings.port, trainer_port)
        yield [Service(p, KEY, q, i) for p, q, i in zip(ports, paths, ids, strict=True)]
    finally:
        trainer.kill()
        trainer.wait()
        log.close()
    lines = (stack.output() + (tmp_path / "trainer.log").read_text()).splitlines()
    errors = [line for line in lines if "Traceback" in line and '-api"' in line]
    assert not errors, errors[:3]


def send_all(services: list[Service], verdict: Verdict) -> None:
    abused = round(CASES * ABUSED / len(services))
    by_schema = -(-CASES // len(services)) - abused
    for number, service in enumerate(services):
        url = f"http://127.0.0.1:{service.port}"
        held = hold_open(service.port, SLOW_CONNECTIONS)
        Fuzzer(url, KEY, service.ids, verdict, SEED + number).run(by_schema)
        abuse(service, verdict, abused, SEED + number)
        for connection in held:
            connection.close()


def test_no_request_breaks_a_service(
    services: list[Service], capsys: pytest.CaptureFixture[str]
) -> None:
    ports = [str(service.port) for service in services]
    started = time.monotonic()
    verdict = Verdict()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.health", *ports],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as pinger:  # fmt: skip
        try:
            send_all(services, verdict)
        finally:
            pings = json.loads(pinger.communicate(b"\n")[0])
    seconds = time.monotonic() - started
    answered = sorted(ping for ping in pings if ping is not None)
    p99_s = answered[int(0.99 * (len(answered) - 1))]
    with capsys.disabled():
        sys.stdout.write(
            f"\nfuzz: cases={verdict.cases} server_errors={verdict.server_errors} "
            f"wrong={len(verdict.wrong)} largest_refusal_bytes={verdict.largest_refusal_bytes} "
            f"healthz_p99_ms={1000 * p99_s:.0f} healthz_max_ms={1000 * answered[-1]:.0f} "
            f"healthz_asked={len(pings)} seconds={seconds:.0f} load={os.getloadavg()[0]:.1f} "
            f"statuses={dict(sorted(verdict.statuses.items()))}\n"
        )
    assert not verdict.wrong, verdict.report()
    assert verdict.cases >= CASES
    assert verdict.largest_refusal_bytes < MAX_REFUSAL_BYTES
    assert len(answered) == len(pings), "a health check went unanswered"
    assert p99_s < MAX_HEALTH_S
