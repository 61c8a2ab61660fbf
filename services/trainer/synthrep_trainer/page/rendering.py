"""Templates to HTML; everything that comes from outside is escaped."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_NOTHING = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def render(template: str, **values: Any) -> str:
    """One template as HTML."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("synthrep_trainer.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for make in (number, count, counted, percent, ratio, size, duration, clock, date):
        environment.filters[make.__name__] = make
    return environment


def number(value: float | None) -> str:
    """Three digits that matter."""
    return _NOTHING if value is None else f"{value:.3g}"


def count(value: int | None) -> str:
    """With a narrow space between thousands."""
    return _NOTHING if value is None else f"{value:,}".replace(",", "\u202f")


def counted(value: int, noun: str) -> str:
    """So many of something: `1 image`, `2 images`."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def percent(fraction: float, unit: str = " %") -> str:
    """A fraction in percent, with one decimal."""
    return f"{100 * fraction:.1f}{unit}"


def ratio(value: float | None) -> str:
    """`1 : 4` for a quarter, `4 : 1` for four."""
    if not value:
        return _NOTHING
    return f"{_short(value)} : 1" if value > 1 else f"1 : {_short(1 / value)}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else count(round(value))


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that fits."""
    if num_bytes is None:
        return _NOTHING
    for unit in _UNITS:
        if num_bytes < 1000 or unit == _UNITS[-1]:
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds in the two units that fit."""
    if seconds is None:
        return _NOTHING
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def clock(moment: datetime) -> str:
    """A time of day in UTC."""
    return f"{moment.astimezone(UTC):%H:%M:%S} UTC"


def date(moment: datetime) -> str:
    """A day and a time of it in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
