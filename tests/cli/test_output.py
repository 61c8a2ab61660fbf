"""Tables keep their ids whole, whatever the width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from synthrep_cli.output import fitted, short_number

ID = "20261125-170000-123456-0123456789ab"
COLUMNS = ("id", "data set", "state", "loss", "speed")
ROWS = [(ID, "a-name-of-some-length", "running", "0.123", "12.5 images/s")]
SPARE = ("speed", "loss")


def printed(*, terminal: bool, width: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    console.print(fitted(console, COLUMNS, ROWS, spare=SPARE))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [44, 60, 70, 80, 100, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_id_is_whole_at_every_width(width, terminal):
    assert ID in printed(terminal=terminal, width=width)


def test_a_narrow_terminal_has_fewer_columns_and_says_which():
    text = printed(terminal=True, width=80)
    assert "running" in text
    assert "12.5" not in text
    assert "no room for speed" in text
    assert "no room" not in printed(terminal=True, width=120)


def test_without_a_terminal_a_row_is_one_whole_line():
    (line,) = [line for line in printed(terminal=False, width=40).splitlines() if ID in line]
    assert "12.5 images/s" in line


def test_what_has_no_room_beside_an_id_is_folded_and_not_lost():
    text = printed(terminal=True, width=58)
    cells = [line.split("│")[2].strip() for line in text.splitlines() if "│" in line]
    assert "".join(cells) == "a-name-of-some-length"


def test_a_caption_with_brackets_is_shown_as_it_is():
    console = Console(file=io.StringIO(), width=80)
    console.print(fitted(console, ("index", "caption"), [(1, "[red] a dog")]))
    assert "[red] a dog" in console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (2.5, "2.5"), (0.12345, "0.123"), (999.4, "999"), (999.6, "1,000"),
     (1234.5, "1,234")],
)  # fmt: skip
def test_numbers_are_short_and_have_no_exponent_that_a_person_must_read(value, text):
    assert short_number(value) == text
