"""The time that is left, in words."""

from __future__ import annotations

import pytest

from synthrep_cli.time_left import TimeLeft


@pytest.mark.parametrize(
    ("second", "done", "words"),
    [
        (10, 100, ""),  # nothing was done since
        (10, 110, "about 6 minutes left"),
        (10, 450, "less than a minute left"),
        (10, 150, "about 1 minute left"),
        (0, 110, ""),  # no time has passed
        (10, 500, ""),
    ],
)
def test_time_left_is_by_the_speed_since_it_was_first_told(second, done, words):
    now = [0.0]
    time_left = TimeLeft(clock=lambda: now[0])
    assert time_left(100, 500) == ""
    now[0] = second
    assert time_left(done, 500) == words
