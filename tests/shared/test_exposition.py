"""`/metrics` of a process that is no API: there when asked for, and never the process's trouble."""

from __future__ import annotations

import logging
import socket

import httpx
import pytest
from prometheus_client import Counter
from prometheus_client.registry import Collector
from pydantic import ValidationError

from synthrep_shared.exposition import exposed, make_registry
from synthrep_shared.settings import ServiceSettings

HOST = "127.0.0.1"


class Service(ServiceSettings):
    """A service that reads nothing of its own."""


def scrape(port: int) -> str:
    answer = httpx.get(f"http://{HOST}:{port}/metrics", trust_env=False)
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def test_a_scrape_shows_the_figures_of_now():
    registry = make_registry()
    images = Counter("images", "Images.", registry=registry)
    with exposed(registry, HOST, [0]) as port:
        images.inc(3)
        text = scrape(port)
    assert "images_total 3.0" in text
    assert "process_resident_memory_bytes" in text


def test_the_port_is_free_again_after_the_end():
    with exposed(make_registry(), HOST, [0]) as port:
        pass
    with exposed(make_registry(), HOST, [port]) as again:
        assert again == port


def test_the_first_free_port_is_taken():
    with (
        socket.create_server((HOST, 0)) as taken,
        exposed(make_registry(), HOST, [taken.getsockname()[1], 0]) as port,
    ):
        assert scrape(port)


def test_ports_that_are_taken_or_none_are_worth_a_warning_alone(caplog):
    with (
        socket.create_server((HOST, 0)) as taken,
        caplog.at_level(logging.WARNING),
        exposed(make_registry(), HOST, [taken.getsockname()[1], 65_536]) as port,
    ):
        assert port == 0
    assert [record.message for record in caplog.records] == ["metrics_not_served"]


def test_without_ports_nothing_listens(caplog):
    with exposed(make_registry(), HOST, Service().metrics_ports()) as port:
        assert port == 0
    assert not caplog.records


def test_a_collector_that_raises_costs_one_scrape(capsys):
    class Broken(Collector):
        def collect(self):
            if self.is_broken:
                raise RuntimeError("broken")
            return []

        is_broken = False

    registry, broken = make_registry(), Broken()
    registry.register(broken)
    with exposed(registry, HOST, [0]) as port:
        broken.is_broken = True
        assert httpx.get(f"http://{HOST}:{port}/metrics", trust_env=False).status_code == 500
        broken.is_broken = False
        assert scrape(port)


def test_processes_of_one_host_have_ports_of_their_own():
    settings = Service(metrics_port=9464)
    assert list(settings.metrics_ports()) == [9464]
    assert list(settings.metrics_ports(1, 3)) == [9465, 9466, 9467]
    assert list(Service().metrics_ports(1, 3)) == []
    with pytest.raises(ValidationError):
        Service(metrics_port=65_536)
