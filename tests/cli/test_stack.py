"""A folder belongs to one stack at a time."""

from __future__ import annotations

import socket
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
