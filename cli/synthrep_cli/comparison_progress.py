"""How far a comparison is: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from synthrep_cli.time_left import TimeLeft

_PLAIN_EVERY_S = 30.0
_SPEED_OVER_S = 600.0  # runs of different rows differ in speed


class Show(Protocol):
    """Told how much of what is done."""

    def __call__(self, what: str, done: int, total: int, facts: str = "") -> None: ...


@contextmanager
def progress(console: Console) -> Iterator[Show]:
    """The callback; what was done before the first call counts as done, not as speed."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(),
               TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(),
               TextColumn("{task.fields[facts]}"))  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_OVER_S) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, done: int, total: int, facts: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, completed=done, total=total, facts=facts)
            bars.update(tasks[what], completed=done, total=total, facts=facts)

        yield draw


class Lines:
    """A line when something was finished, else every half minute."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._time_left: dict[str, TimeLeft] = {}
        self._shown_s = float("-inf")
        self._facts = ""

    def __call__(self, what: str, done: int, total: int, facts: str = "") -> None:
        now = self._clock()
        time_left = self._time_left.setdefault(what, TimeLeft(self._clock))(done, total)
        if now - self._shown_s < _PLAIN_EVERY_S and facts == self._facts:
            return
        self._shown_s, self._facts = now, facts
        left = f", {time_left}" if time_left else ""
        text = f"{what}: {done} of {total}{left}" + (f"; {facts}" if facts else "")
        self._console.print(text, soft_wrap=True)
