"""Heartbeats: what a health check finds in the file."""

import os
from pathlib import Path

from synthrep_shared.heartbeat import Heartbeat


def age_to(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def test_the_file_holds_the_newest_state(tmp_path):
    heartbeat = Heartbeat(tmp_path / "alive", clock=lambda: 0.0)
    for state in ("starting", "idle"):
        heartbeat.beat(state)
        assert (tmp_path / "alive").read_text() == state


def test_the_file_stays_young_at_a_bounded_rate(tmp_path):
    now = [0.0]
    path = tmp_path / "alive"
    heartbeat = Heartbeat(path, clock=lambda: now[0])
    heartbeat.beat("idle")
    age_to(path, 1.0)
    now[0] = 0.9
    heartbeat.beat("idle")
    assert path.stat().st_mtime == 1.0
    now[0] = 1.0
    heartbeat.beat("idle")
    assert path.stat().st_mtime > 1.0


def test_neither_a_missing_path_nor_a_full_disk_is_the_callers_trouble(tmp_path):
    Heartbeat(None).beat("idle")
    heartbeat = Heartbeat(tmp_path / "absent" / "alive")
    heartbeat.beat("idle")
    (tmp_path / "absent").mkdir()
    heartbeat.beat("idle")
    assert (tmp_path / "absent" / "alive").read_text() == "idle"
