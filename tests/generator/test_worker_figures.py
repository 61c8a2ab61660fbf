"""A worker's series: what they count, and that a real run is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from synthrep_cli.stack import free_port
from synthrep_generator.pipe import Finished, Raised
from synthrep_generator.supervisor import Crashed, Stopped
from synthrep_generator.worker_figures import WorkerFigures

_PREFIX = "synthrep_generator_worker_"


def finished(**changes: Any) -> Finished:
    fields = {
        "chunk_id": "c", "committed": 3, "failed": 1, "images": 30, "filtered": {"clip": 4},
        "stopped": False, "device_s": 2.5, "decode_s": 0.5, "write_s": 0.25, "out_of_memory": 1,
        "batch_images": 16, "grown_bytes": 0,
    }  # fmt: skip
    return Finished(**fields | changes)


def value(figures: WorkerFigures, name: str, **labels: str) -> float | None:
    return figures.registry.get_sample_value(_PREFIX + name, labels)


def test_what_runs_say_adds_up() -> None:
    figures = WorkerFigures()
    figures.ran(finished(), 4.0)
    figures.ran(finished(committed=1, filtered={"clip": 1, "blank": 2}, batch_images=8), 6.0)
    assert value(figures, "images_total") == 60
    assert value(figures, "groups_total") == 4
    assert value(figures, "failed_prompts_total") == 2
    assert value(figures, "denoise_seconds_total") == 4.0
    assert value(figures, "decode_seconds_total") == 1.0
    assert value(figures, "write_seconds_total") == 0.5
    assert value(figures, "run_seconds_total") == 10.0
    assert value(figures, "out_of_memory_total") == 2
    assert value(figures, "batch_images") == 8
    assert value(figures, "filtered_images_total", check="clip") == 5
    assert value(figures, "filtered_images_total", check="blank") == 2


def test_runs_are_told_apart_by_how_they_ended() -> None:
    figures = WorkerFigures()
    raised = Raised(chunk_id="c", reason="OSError: full", retryable=True)
    outcomes = [finished(), finished(stopped=True), Stopped(), raised, Crashed("", frozenset())]
    for outcome in outcomes:
        figures.ran(outcome, 1.0)
    counts = [value(figures, "runs_total", end=end)
              for end in ("finished", "stopped", "raised", "crashed")]  # fmt: skip
    assert counts == [1, 2, 1, 1]


def test_a_run_that_reached_no_model_leaves_the_batch_as_it_was() -> None:
    figures = WorkerFigures()
    figures.ran(finished(), 1.0)
    figures.ran(finished(batch_images=0), 1.0)
    assert value(figures, "batch_images") == 16


def test_a_worker_is_in_one_state() -> None:
    figures = WorkerFigures()
    for state in ("starting", "idle", "running"):
        figures.be(state)
    states = {s: value(figures, "state", state=s)
              for s in ("starting", "idle", "waiting", "running")}  # fmt: skip
    assert states == {"starting": 0, "idle": 0, "waiting": 0, "running": 1}


def test_out_of_memory_is_told_from_other_errors() -> None:
    reasons = {"OutOfMemoryError: CUDA out of memory": True, "RuntimeError: odd": False}
    for reason, expected in reasons.items():
        assert Raised(chunk_id="", reason=reason, retryable=False).is_out_of_memory is expected


@pytest.mark.redis
def test_processes_without_an_api_answer_prometheus(generator_stack: Callable[..., Any]) -> None:
    stack = generator_stack()
    stack.accept(["a", "b", "c"], quality_gate={"blank": True}, images=2)
    ports = {part: free_port() for part in ("reconciler", "worker")}
    for part, port in ports.items():
        stack.start(part, SYNTHREP_GENERATOR_METRICS_PORT=str(port))

    def lines(part: str) -> list[str]:
        url = f"http://127.0.0.1:{ports[part]}/metrics"
        return httpx.get(url, trust_env=False).text.splitlines()

    stack.wait_for(lambda: len(stack.decided()) == 3)
    stack.wait_for(lambda: _PREFIX + 'runs_total{end="finished"} 1.0' in lines("worker"))
    shown = lines("worker")
    assert _PREFIX + "images_total 6.0" in shown
    assert _PREFIX + "groups_total 3.0" in shown
    assert _PREFIX + "batch_images 4.0" in shown
    assert _PREFIX + "device_starts_total 1.0" in shown
    assert "synthrep_generator_reconciler_fed_chunks_total 1.0" in lines("reconciler")
    assert not [line for line in shown if "birds" in line]
