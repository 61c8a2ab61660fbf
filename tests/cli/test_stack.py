"""A folder belongs to one stack at a time."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

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


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from synthrep_cli.stack import Stack, StackConfig

os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
stack = Stack(StackConfig(folder=Path(sys.argv[1]), redis_url="redis://127.0.0.1:1/0"))
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
