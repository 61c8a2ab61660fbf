"""Numbers by step: every step once, readable at any moment."""

from __future__ import annotations

import errno
import resource
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest

from synthrep_trainer.metrics import MetricsWriter, StepMetrics, last_metrics, read_metrics


def line(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, time=datetime.now(UTC), loss=5 / step, lr=0.1, gradient_norm=1.0,
        effective_rank=None, images_seen=8 * step, images_per_s=9.0, wait_s=0.0,
        images_committed=40, generated_per_trained=5 / step, shards_quarantined=0,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", step=0)
    for step in range(1, 120):
        writer.write(line(step))
    writer.close()
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("after", [-1, 0, 1, 2, 50, 117, 118, 119, 500])
def test_reading_begins_after_any_step(path, after):
    steps = [entry["step"] for entry in read_metrics(path, after=after, limit=7)]
    assert steps == list(range(max(after, 0) + 1, 120))[:7]


def test_a_torn_last_line_is_not_read(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [entry["step"] for entry in read_metrics(path, after=116, limit=9)] == [117, 118]
    assert last_metrics(path)["step"] == 118


def test_a_resumed_run_writes_its_steps_again(path):
    path.write_bytes(path.read_bytes() + b'{"step": 12')
    writer = MetricsWriter(path, step=100)
    writer.write(line(101))
    writer.close()
    assert [entry["step"] for entry in read_metrics(path, after=98, limit=9)] == [99, 100, 101]
    assert last_metrics(path)["step"] == 101


def test_a_line_that_finds_no_room_is_none(path):
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = MetricsWriter(path, step=119)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
        with pytest.raises(OSError, match="short write") as caught:
            writer.write(line(120))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.errno == errno.ENOSPC
    assert path.stat().st_size == size
    writer.write(line(120))
    writer.close()
    assert [entry["step"] for entry in read_metrics(path, after=118, limit=9)] == [119, 120]


def test_going_on_reads_little_of_what_is_there(path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", None)
    MetricsWriter(path, step=60).close()
    assert last_metrics(path)["step"] == 60


def test_a_reader_stays_with_the_file_that_it_opened(path, monkeypatch):
    opened = []
    real = Path.open

    def open_once(self, *args, **given):
        opened.append(self)
        return real(self, *args, **given)

    monkeypatch.setattr(Path, "open", open_once)
    assert len(read_metrics(path, after=100, limit=5)) == 5
    assert len(opened) == 1


def test_before_the_first_step_there_are_none(tmp_path):
    assert read_metrics(tmp_path / "no", after=0, limit=1) == []
    assert last_metrics(tmp_path / "no") is None
    MetricsWriter(tmp_path / "new", step=0).close()
    assert last_metrics(tmp_path / "new") is None
