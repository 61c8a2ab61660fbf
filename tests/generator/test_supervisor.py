"""The supervisor and a real device process with the fake model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.pipe import Finished, Raised
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.supervisor import Crashed, Stopped, Supervisor, Wish

Start = Callable[..., tuple[Supervisor, Any]]


@pytest.fixture
def start(generator_stack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Makes a supervisor whose device process has the settings of a stack."""
    supervisors: list[Supervisor] = []

    def make(**settings: Any) -> tuple[Supervisor, Any]:
        stack = generator_stack(**settings)
        for name, value in stack.environment().items():
            monkeypatch.setenv(name, value)
        supervisors.append(Supervisor(stack.settings))
        return supervisors[-1], stack

    yield make
    for supervisor in supervisors:
        supervisor.kill()


def chunk(count: int, batch: str = "b0") -> Chunk:
    return chunk_from_places("birds", [Place(batch, i) for i in range(count)])


def pid_of(supervisor: Supervisor) -> int:
    process = supervisor._process
    assert process is not None
    return process._popen.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_without_a_model_does_not_start() -> None:
    with pytest.raises(ValidationError, match="models"):
        GeneratorSettings(models={})


def test_one_process_runs_many_chunks(start: Start) -> None:
    supervisor, stack = start()
    stack.accept(["a", "b"], batch="b0")
    stack.accept(["c"], batch="b1")
    outcomes, pids = [], set()
    for wanted in (chunk(2), chunk(1, "b1")):
        outcomes.append(supervisor.run(wanted, lambda: None))
        pids.add(pid_of(supervisor))
    assert [(o.committed, o.images) for o in outcomes if isinstance(o, Finished)] == [
        (2, 4),
        (1, 2),
    ]
    assert len(pids) == 1
    assert supervisor.device == "fake"


def test_a_crash_names_the_prompts_in_work_and_the_next_run_gets_a_new_process(
    start: Start,
) -> None:
    supervisor, stack = start()
    stack.accept(["a", "b", "c", "x [fake:crash]", "e"])
    outcome = supervisor.run(chunk(5), lambda: None)
    assert isinstance(outcome, Crashed)
    assert outcome.active == {Place("b0", 2), Place("b0", 3)}  # one pass: four images
    assert "-9" in outcome.reason
    assert isinstance(supervisor.run(chunk(2), lambda: None), Finished)
    counted = [
        supervisor.figures.registry.get_sample_value(f"synthrep_generator_worker_{name}", labels)
        for name, labels in (
            ("runs_total", {"end": "crashed"}), ("runs_total", {"end": "finished"}),
            ("device_starts_total", {}), ("device_losses_total", {}),
            ("groups_total", {}), ("images_total", {}), ("batch_images", {}), ("leases_held", {}),
        )
    ]  # fmt: skip
    assert counted == [1, 1, 2, 1, 2, 4, 4, 0]


def test_an_exception_of_the_model_is_a_crash_with_its_reason(start: Start) -> None:
    supervisor, stack = start()
    stack.accept(["x [fake:raise]"])
    outcome = supervisor.run(chunk(1), lambda: None)
    assert isinstance(outcome, Crashed)
    assert outcome.active == {Place("b0", 0)}
    assert "RuntimeError" in outcome.reason


def test_a_process_that_grew_is_replaced_between_two_runs(start: Start) -> None:
    supervisor, stack = start(max_growth_bytes=60 << 20)
    stack.accept(["a [fake:leak]", "b", "c [fake:leak]", "d", "e"], images=1)
    places = [Place("b0", i) for i in range(5)]
    pids = []
    for place in places:  # a leak costs 16 MiB, and a chunk of one prompt has one
        outcome = supervisor.run(chunk_from_places("birds", [place]), lambda: None)
        assert isinstance(outcome, Finished)
        pids.append(pid_of(supervisor))
    assert len(set(pids)) == 1
    stack.accept(["x [fake:leak]"], batch="b1", images=3)
    assert isinstance(supervisor.run(chunk(1, "b1"), lambda: None), Finished)
    assert not is_running(pids[0])
    stack.accept(["y"], batch="b2")
    assert isinstance(supervisor.run(chunk(1, "b2"), lambda: None), Finished)
    assert pid_of(supervisor) != pids[0]
    assert not supervisor.is_broken


def test_a_fault_of_the_device_is_held_against_the_chunk_that_meets_it_alone(
    start: Start,
) -> None:
    supervisor, stack = start()
    stack.accept(["a", "x [fake:fault]", "c"], images=1)
    lone = chunk_from_places("birds", [Place("b0", 1)])
    for _ in range(4):
        outcome = supervisor.run(lone, lambda: None)
        assert isinstance(outcome, Crashed)
        assert outcome.active == {Place("b0", 1)}
        assert "CUDA error" in outcome.reason
    assert not supervisor.is_broken
    assert isinstance(supervisor.run(chunk(1), lambda: None), Finished)


def test_faults_of_one_chunk_after_another_are_the_device_s(start: Start) -> None:
    supervisor, stack = start()
    stack.accept([f"x{i} [fake:fault]" for i in range(4)] + ["a"], images=1)
    lone = [chunk_from_places("birds", [Place("b0", i)]) for i in range(5)]
    outcomes = [supervisor.run(chunk, lambda: None) for chunk in lone[:2]]
    assert [len(o.active) for o in outcomes if isinstance(o, Crashed)] == [1, 0]
    assert isinstance(supervisor.run(lone[4], lambda: None), Finished)  # made an image: it is well
    outcomes = [supervisor.run(chunk, lambda: None) for chunk in lone[:4]]
    assert [len(o.active) for o in outcomes if isinstance(o, Crashed)] == [1, 0, 0, 0]
    assert supervisor.is_broken


def test_a_hang_is_ended_by_the_clock(start: Start) -> None:
    supervisor, stack = start(hang_s=0.6)
    stack.accept(["x [fake:hang]"])
    outcome = supervisor.run(chunk(1), lambda: None)
    assert isinstance(outcome, Crashed)
    assert outcome.active == {Place("b0", 0)}
    assert "no progress" in outcome.reason


def test_a_job_without_end_is_ended_by_the_clock(start: Start) -> None:
    supervisor, stack = start(job_limit_s=1.5, fake_delay_s=0.4)
    stack.accept([f"p{i}" for i in range(50)])
    outcome = supervisor.run(chunk(50), lambda: None)
    assert isinstance(outcome, Crashed)
    assert "longer than 1.5 s" in outcome.reason


def test_trouble_with_the_place_is_retryable_and_leaves_the_process(start: Start) -> None:
    supervisor, stack = start()
    stack.accept(["a"])
    outcome = supervisor.run(chunk(1, "absent"), lambda: None)
    assert isinstance(outcome, Raised)
    assert outcome.retryable
    pid = pid_of(supervisor)
    assert isinstance(supervisor.run(chunk(1), lambda: None), Finished)
    assert pid_of(supervisor) == pid


def test_a_model_that_cannot_be_loaded_is_no_prompt_s_fault(start: Start) -> None:
    supervisor, stack = start(synthesizer="diffusers")
    stack.accept(["a"], batch="b0")
    stack.accept(["a"], batch="b1")
    supervisor.tend()
    for batch in ("b0", "b1"):
        outcome = supervisor.run(chunk(1, batch), lambda: None)
        assert isinstance(outcome, Raised)
        assert outcome.retryable
        # The answer to this run, not that to loading the model before.
        assert outcome.chunk_id == chunk(1, batch).id
        assert "ModelFilesMissingError" in outcome.reason


@pytest.mark.parametrize("wish", [Wish.SEAL, Wish.DROP])
def test_a_run_ends_soon_when_it_is_wished(start: Start, wish: Wish) -> None:
    supervisor, stack = start(fake_delay_s=0.1)
    stack.accept([f"p{i}" for i in range(50)])
    supervisor.run(chunk(1), lambda: None)
    began = time.monotonic()
    outcome = supervisor.run(chunk(50), lambda: wish if time.monotonic() > began + 1 else None)
    assert time.monotonic() - began < 5
    assert isinstance(outcome, Finished)
    assert outcome.stopped
    assert (outcome.committed > 0) == (wish is Wish.SEAL)
    assert len(stack.decided()) == 1 + outcome.committed


def test_a_chunk_that_was_dropped_can_run_again(start: Start) -> None:
    supervisor, stack = start(fake_delay_s=0.02)
    stack.accept([f"p{i}" for i in range(10)])
    outcomes = []
    for wish in (Wish.DROP, None):
        supervisor.run(chunk(1), lambda: None)  # the model is loaded when the wish comes
        outcomes.append(supervisor.run(chunk(10), lambda wish=wish: wish))
    assert [(o.stopped, o.committed) for o in outcomes if isinstance(o, Finished)] == [
        (True, 0),
        (False, 9),
    ]


def test_a_process_that_loads_the_model_is_not_waited_for(start: Start) -> None:
    supervisor, stack = start(fake_delay_s=60.0)  # the first image, before any prompt
    stack.accept(["a"])
    assert isinstance(supervisor.run(chunk(1), lambda: Wish.SEAL), Stopped)


def test_a_device_that_cannot_make_a_first_image_is_broken_and_no_prompt_is_to_blame(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, stack = start()
    stack.accept(["a"])
    monkeypatch.setenv("SYNTHREP_GENERATOR_NO_SUCH_SETTING", "1")  # its main raises
    outcomes = [supervisor.run(chunk(1), lambda: None) for _ in range(3)]
    assert all(isinstance(o, Crashed) and not o.active for o in outcomes)
    assert supervisor.is_broken


def test_an_idle_process_that_died_is_replaced(start: Start) -> None:
    supervisor, _ = start()
    supervisor.tend()
    first = pid_of(supervisor)
    os.kill(first, signal.SIGKILL)
    while is_running(first):
        time.sleep(0.01)
    while not supervisor.device:
        supervisor.tend()
        time.sleep(0.01)
    assert pid_of(supervisor) != first


def test_a_device_process_dies_with_its_worker(start: Start) -> None:
    _, stack = start(fake_delay_s=60.0)
    code = (
        "import time; from synthrep_generator.settings import GeneratorSettings as S;"
        "from synthrep_generator.supervisor import Supervisor; s = Supervisor(S()); s.tend();"
        "print(s._process._popen.pid, flush=True); time.sleep(600)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with worker:
        assert worker.stdout is not None
        device = int(worker.stdout.readline())
        assert is_running(device)
        worker.kill()
    stack.wait_for(lambda: not is_running(device), timeout_s=5)
