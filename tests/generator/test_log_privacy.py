"""What no process of the generator may log: prompts and keys."""

from __future__ import annotations

import json

import httpx
import pytest

from synthrep_cli.stack import free_port
from synthrep_shared.client import SynthRep

pytestmark = pytest.mark.redis
PLANTED = "Planted-7f3a"
KEY = "planted-key-5b1c"
KINDS = ("refuse", "blank", "raise", "crash")


def test_logs_of_all_processes_are_json_lines_without_prompts_and_keys(generator_stack):
    port = free_port()
    keys = [{"name": "lab", "key": KEY}]
    stack = generator_stack(port=port, api_keys=keys, max_strikes=1, log_level="INFO")
    for part in ("api", "reconciler", "worker"):
        stack.start(part)
    url = f"http://127.0.0.1:{port}"
    with SynthRep(url, api_key=KEY, retries=10) as client:
        prompts = [f"{PLANTED} {i}\n\u2028 line" for i in range(4)]
        prompts += [f"{PLANTED} [fake:{kind}]" for kind in KINDS]
        batch = client.submit("birds", prompts, images_per_prompt=1)
        stack.wait_for(lambda: client.batch(batch.id).prompts.queued == 0)
        stack.wait_for(lambda: client.batch(batch.id).state == "completed")
        assert client.batch(batch.id).prompts.failed == len(KINDS)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    hostile = json.dumps({"dataset": "birds", "prompts": [f"{PLANTED}\x1b[31m"]})
    with httpx.Client(base_url=url, headers=headers) as http:
        assert http.post("/v1/batches", content=hostile).status_code == 422
        assert http.get(f"/v1/batches/{PLANTED}%0a%1b").status_code == 404
        for path in ("/metrics", "/openapi.json"):
            assert KEY not in http.get(path).text
        assert (
            http.get("/v1/batches", headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        )
    stack.stop()
    output = stack.output()
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert {"settings were read", "model loaded", "device process ended"} <= set(events)
    for secret in (PLANTED, KEY, "\x1b"):
        assert secret not in output
