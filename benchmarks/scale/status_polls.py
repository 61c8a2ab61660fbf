"""A client that asks for a batch's state all the time: `python -m benchmarks.scale.status_polls`.

It is a process of its own, so that an answer does not wait for whatever else the measurement does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time

from benchmarks.harness import ROOT

_POLL_S = 0.05


def start_polls(port: int, batch: str) -> subprocess.Popen[str]:
    """Ask the API at `port` until the batch is complete; `take_polls` gives what was seen."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scale.status_polls", str(port), batch],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def take_polls(client: subprocess.Popen[str]) -> list[float]:
    """Wait for the end; milliseconds of each answer. Raises RuntimeError if an answer was bad."""
    output, _ = client.communicate()
    if client.returncode:
        raise RuntimeError(f"the client ended with status {client.returncode}")
    found: list[float] = json.loads(output)
    return found


def poll(port: int, batch: str) -> list[float]:
    """Milliseconds of each answer until the batch is complete."""
    milliseconds = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        while True:
            started = time.perf_counter()
            connection.request("GET", f"/v1/batches/{batch}")
            answer = connection.getresponse().read()
            milliseconds.append((time.perf_counter() - started) * 1e3)
            if json.loads(answer)["state"] == "completed":
                return milliseconds
            time.sleep(_POLL_S)


if __name__ == "__main__":
    print(json.dumps(poll(int(sys.argv[1]), sys.argv[2])))
