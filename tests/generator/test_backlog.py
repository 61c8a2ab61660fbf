from __future__ import annotations

import logging
import threading
import time

import pytest

from synthrep_generator.backlog import LiveWork
from synthrep_generator.errors import BacklogUnknownError


def test_numbers_come_from_the_backlog(backlog):
    backlog.prompts, backlog.depth = {"b": 3}, 2
    live = LiveWork(backlog, refresh_s=0)
    assert live.running() == {"b": 3}
    assert (live.snapshot().queue.depth, live.snapshot().queue.running) == (2, 1)


def test_backlog_is_not_asked_again_before_it_is_due(backlog):
    live = LiveWork(backlog, refresh_s=3600)
    assert live.running() == {}
    backlog.prompts = {"b": 3}
    assert live.running() == {}


def test_lost_redis_is_unknown_at_once_and_logged_once(backlog, caplog):
    live = LiveWork(backlog, refresh_s=0)
    backlog.prompts = {"b": 3}
    live.snapshot()
    backlog.is_up = False
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert live.running() == {}
            with pytest.raises(BacklogUnknownError):
                live.snapshot()
            live.nudge()
        backlog.is_up = True
        assert live.running() == {"b": 3}
    assert [record.message for record in caplog.records] == ["redis was lost", "redis came back"]


def test_stalled_redis_keeps_nobody_waiting(backlog):
    release = threading.Event()
    backlog.queue_view = release.wait
    live = LiveWork(backlog)
    num_threads = threading.active_count()
    started = time.perf_counter()
    for _ in range(3):
        assert live.running() == {}
        assert live.workers() == ()
    assert time.perf_counter() - started < 2.0
    assert threading.active_count() <= num_threads + 1
    release.set()


def test_nudge_reaches_the_backlog(backlog):
    LiveWork(backlog).nudge()
    assert backlog.nudges == 1


def test_recent_numbers_are_answered_while_newer_ones_are_on_the_way(backlog):
    backlog.prompts = {"b": 3}
    live = LiveWork(backlog, refresh_s=0.25)
    assert live.running() == {"b": 3}
    release = threading.Event()
    backlog.queue_view = release.wait
    time.sleep(0.25)
    started = time.perf_counter()
    assert live.running() == {"b": 3}
    assert time.perf_counter() - started < 0.04
    release.set()


def test_numbers_are_at_hand_once_they_are_recent(backlog):
    backlog.prompts = {"b": 3}
    live = LiveWork(backlog, refresh_s=3600)
    live.running()
    assert live.running_at_hand() == {"b": 3}


def test_numbers_at_hand_are_not_waited_for(backlog, monkeypatch):
    release = threading.Event()
    backlog.queue_view = release.wait
    live = LiveWork(backlog)
    monkeypatch.setattr(live._changed, "wait", None)
    assert live.running_at_hand() is None
    release.set()
