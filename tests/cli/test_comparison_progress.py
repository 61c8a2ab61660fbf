"""What a comparison says where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from synthrep_cli.comparison_progress import Lines, progress


def test_a_line_each_half_minute_or_when_something_ended_with_the_time_left():
    now, output = [0.0], io.StringIO()
    lines = Lines(Console(file=output), clock=lambda: now[0])
    for second, done, facts in (
        (0, 100, "0 of 2 runs"), (20, 120, "0 of 2 runs"), (31, 131, "0 of 2 runs"),
        (40, 200, "1 of 2 runs"), (41, 200, "1 of 2 runs"), (42, 200, "2 of 2 runs"),
    ):  # fmt: skip
        now[0] = second
        lines("views", done, 200, facts)
    assert output.getvalue().splitlines() == [
        "views: 100 of 200; 0 of 2 runs",
        "views: 131 of 200, about 1 minute left; 0 of 2 runs",
        "views: 200 of 200; 1 of 2 runs",
        "views: 200 of 200; 2 of 2 runs",
    ]


def test_a_terminal_gets_bars():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with progress(console) as show:
        show("images of captions", 1, 2)
        show("views", 10, 40, "1 of 2 runs are over")
    assert "25 %" in output.getvalue()
    assert "1 of 2 runs are over" in output.getvalue()
