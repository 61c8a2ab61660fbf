"""`python -m tests.fuzz.health PORT...`: asks for `/healthz` until stdin ends, then tells.

Prints one JSON list of the seconds that each answer took; null where none came.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

_PAUSE_S = 0.05
_PATIENCE_S = 10.0


def ask(port: int) -> float | None:
    """Seconds that an answer 200 took on a connection of its own."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        answer.read()
        return time.perf_counter() - started if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def main(ports: list[int]) -> None:
    """Until stdin ends."""
    seconds = []
    while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
        seconds += [ask(port) for port in ports]
    sys.stdout.write(json.dumps(seconds))


if __name__ == "__main__":
    main([int(port) for port in sys.argv[1:]])
