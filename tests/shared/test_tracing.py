"""Traces: off and light unless asked for, and joined by ids alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from synthrep_shared import tracing
from synthrep_shared.tracing import CALLER, NoTracer, OtlpTracer, ids_of, make_tracer

BATCH, OTHER = "b" * 32, "c" * 32


@pytest.fixture
def exporter():
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    return export.InMemorySpanExporter()


@pytest.fixture
def tracer(exporter):
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    return OtlpTracer("test", export.SimpleSpanProcessor(exporter))


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def test_processes_that_share_nothing_but_an_id_write_one_trace(tracer, exporter):
    tracer.record("accept batch", about=BATCH, seconds=0.5, is_root=True, dataset="birds")
    tracer.record("run chunk", about=BATCH, seconds=2.0, images=10)
    root, run = exporter.get_finished_spans()
    assert (root.context.trace_id, root.context.span_id) == ids_of(BATCH)
    assert root.parent is None
    assert run.context.trace_id == root.context.trace_id
    assert run.parent.span_id == root.context.span_id
    assert run.context.span_id != root.context.span_id
    assert dict(root.attributes) == {"synthrep.dataset": "birds"}
    assert dict(run.attributes) == {"synthrep.images": 10}
    assert root.resource.attributes["service.name"] == "synthrep-test"


def test_a_span_ends_now_and_began_so_many_seconds_ago(tracer, exporter):
    tracer.record("run chunk", about=BATCH, seconds=2.0)
    (span,) = exporter.get_finished_spans()
    assert span.end_time - span.start_time == 2_000_000_000


def test_other_traces_are_linked_up_to_a_bound(tracer, exporter):
    others = [OTHER, *(f"batch-{k}" for k in range(100))]
    tracer.record("make training batch", about="run 1", seconds=0.0, is_root=True, links=others)
    (span,) = exporter.get_finished_spans()
    assert (span.links[0].context.trace_id, span.links[0].context.span_id) == ids_of(OTHER)
    assert len(span.links) == 32


def test_the_callers_own_trace_is_linked_to_the_root(tracer, exporter):
    token = CALLER.set(f"00-{'a' * 32}-{'e' * 16}-01")
    try:
        tracer.record("accept batch", about=BATCH, seconds=0.0, is_root=True)
    finally:
        CALLER.reset(token)
    (span,) = exporter.get_finished_spans()
    assert [link.context.trace_id for link in span.links] == [int("a" * 32, 16)]


@pytest.mark.parametrize("header", ["", "00-short-01", "x" * 9999, "00-\u00e4-b-01"])
def test_a_header_that_is_none_is_passed_over(tracer, exporter, header):
    token = CALLER.set(header)
    try:
        tracer.record("accept batch", about=BATCH, seconds=0.0, is_root=True)
    finally:
        CALLER.reset(token)
    assert not exporter.get_finished_spans()[0].links


def test_ids_are_valid_and_differ():
    assert ids_of(BATCH) == ids_of(BATCH) != ids_of(OTHER)
    trace_id, span_id = ids_of(BATCH)
    assert 0 < trace_id < 1 << 128
    assert 0 < span_id < 1 << 64


def test_unless_asked_for_nothing_is_imported(no_settings):
    script = (
        "import sys; from synthrep_shared.tracing import make_tracer; t = make_tracer('x');"
        "t.record('a', about='b', seconds=1.0, is_root=True, links=['c'], n=1);"
        "sys.exit(t.is_on or any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_what_is_asked_for_and_not_installed_is_worth_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")

    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tracing.importlib, "import_module", refuse)
    assert isinstance(make_tracer("x"), NoTracer)
    assert [record.message for record in caplog.records] == ["traces_not_exported"]
