"""The demo removes what a demo made, and nothing else, and says how far it is."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from synthrep_cli.demo import _bars, clear_folder
from synthrep_cli.stack import StackError, sole_use
from synthrep_cli.time_left import TimeLeft
from synthrep_shared.messages import BatchView, PromptCounts, RunView

NOW = datetime(2026, 1, 1, tzinfo=UTC)


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


def batch(committed: int) -> BatchView:
    counts = PromptCounts(
        accepted=80, queued=80 - committed, running=0, committed=committed, failed=0, cancelled=0
    )
    return BatchView(
        id="b", dataset="demo", state="running", prompts=counts, images_committed=10 * committed,
        images_per_s=5.0, eta_s=None, created_at=NOW,
    )  # fmt: skip


def run(step: int) -> RunView:
    return RunView(
        id="r",
        state="running",
        request={},
        step=step,
        max_steps=500,
        images_seen=0,
        loss=None,
        generated_per_trained=None,
        images_per_s=None,
        created_at=NOW,
        error=None,
    )


def test_a_plain_line_has_the_time_left_once_there_are_steps(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("synthrep_cli.demo.TimeLeft", partial(TimeLeft, lambda: next(clock)))
    monkeypatch.setattr("synthrep_cli.demo._PLAIN_EVERY_S", 0.0)
    console = Console(file=io.StringIO())
    with _bars(console) as show:
        for step in (0, 10, 20):
            show([batch(40)], run(step))
    lines = console.file.getvalue().splitlines()
    assert ["left" in line for line in lines] == [False, False, True]
    assert lines[-1].endswith("step 20/500, loss – · about 8 minutes left")


def test_a_terminal_has_bars_with_the_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with _bars(console) as show:
        show([batch(40)], run(10))
    assert "left" in console.file.getvalue()
    assert "step 10/500" in console.file.getvalue()
