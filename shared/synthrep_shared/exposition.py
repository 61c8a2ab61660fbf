"""`/metrics` of the processes that serve no API: a port of their own, for Prometheus alone.

It takes no key, so that what it shows are figures: no name of a data set, no caption.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

_log = logging.getLogger(__name__)


def make_registry() -> CollectorRegistry:
    """A registry with the figures of this process: memory, CPU time, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@contextmanager
def exposed(registry: CollectorRegistry, host: str, ports: Iterable[int]) -> Iterator[int]:
    """Answer scrapes on the first of the ports that is free, in threads that end with the process.

    Gives the port; 0 where there are no ports, or none is free, which is worth a warning and no
    more.
    """
    server, trouble = None, None
    for port in ports:
        try:
            server, thread = start_http_server(port, host, registry)
            break
        except (OSError, OverflowError) as error:
            trouble = error
    if server is None:
        if trouble is not None:
            _log.warning("metrics_not_served", extra={"error": str(trouble)})
        yield 0
        return
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
