"""A folder belongs to one stack at a time."""

from __future__ import annotations

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from synthrep_cli.stack import Stack, StackConfig, StackError, sole_use


def test_a_second_stack_is_kept_out_of_a_folder(tmp_path: Path) -> None:
    with (
        sole_use(tmp_path / "new"),
        pytest.raises(StackError, match="in use"),
        sole_use(tmp_path / "new"),
    ):
        pass


def test_a_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with sole_use(tmp_path):
            pass


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(StackError, match=f"port {port} is taken"),
            Stack(StackConfig(folder=tmp_path, trainer_port=port)),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_a_redis_that_does_not_answer_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for url in (f"redis://:secret@{address}/0", address):
            with (
                pytest.raises(StackError, match="leave --redis out") as raised,
                Stack(StackConfig(folder=tmp_path, redis_url=url)),
            ):
                pass
            assert "secret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the list of workers answers in turn, then nobody; both services are ready."""
    listed: list[list[str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/readyz":
            return httpx.Response(200)
        return httpx.Response(200, json={"items": listed.pop(0) if listed else []})

    client = partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("synthrep_cli.stack.httpx.Client", client)
    monkeypatch.setattr("synthrep_cli.stack._POLL_S", 0.0)
    return listed


def test_a_stack_says_what_it_waits_for(tmp_path: Path, answers: list[list[str]]) -> None:
    answers += [[], [], ["w"]]
    told: list[str] = []
    Stack(StackConfig(folder=tmp_path)).wait_ready(told.append)
    assert told == ["waiting for worker …"]


def test_without_workers_none_is_waited_for(tmp_path: Path, answers: list[list[str]]) -> None:
    Stack(StackConfig(folder=tmp_path, workers=0)).wait_ready(pytest.fail)


def test_what_does_not_become_ready_is_named(
    tmp_path: Path, answers: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthrep_cli.stack._START_LIMIT_S", -1.0)
    with pytest.raises(StackError, match="^worker not ready"):
        Stack(StackConfig(folder=tmp_path)).wait_ready()


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from synthrep_cli.stack import Stack, StackConfig

os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
stack = Stack(StackConfig(folder=Path(sys.argv[1])))
try:
    with stack:
        print("started all")
except KeyboardInterrupt:
    print("interrupted, with", len(list(Path(sys.argv[1], "logs").iterdir())), "started")
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("none is left")
"""


def test_an_interrupt_amid_a_fork_is_not_lost_nor_is_the_child(tmp_path: Path) -> None:
    program = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["interrupted, with 1 started", "none is left"], done.stderr
