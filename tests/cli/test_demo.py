"""The demo removes what a demo made, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthrep_cli.demo import clear_folder
from synthrep_cli.stack import StackError, sole_use


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("kept?")


def test_what_an_earlier_demo_left_is_removed(tmp_path: Path) -> None:
    put(tmp_path, "data/demo/commit.log", "logs/redis.log", "redis/a", "trainer/b", "report.json")
    clear_folder(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["thesis.tex", "data/birds/intake/a.jsonl"])
def test_a_folder_with_what_no_demo_made_is_left_alone(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, "data/demo/commit.log")
    with pytest.raises(StackError, match="no demo made"):
        clear_folder(tmp_path)
    assert (tmp_path / name).is_file()
    assert (tmp_path / "data/demo/commit.log").is_file()


def test_a_demo_runs_in_a_folder_that_it_keeps_for_itself(tmp_path):
    with sole_use(tmp_path):
        clear_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
