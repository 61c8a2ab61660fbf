"""How every command speaks: tables for people, JSON for programs, an error in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from synthrep_shared.errors import SynthRepError
from synthrep_shared.samples import DATASET_PATTERN, DATASET_RULE

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

_SAID_HERE = {
    "is the service running?": "is the service running? `synthrep up` starts it; another address: "
    "SYNTHREP_GENERATOR_URL, SYNTHREP_TRAINER_URL",
    "GET /v1/probe-datasets": "`synthrep probe-sets ls`",
    "GET /v1/batches": "`synthrep status`",
    "set of this name; choose another": "set of this name; choose another, or remove an uploaded "
    "one first: its folder below probe-sets, in the trainer's folder of runs",
    f"String should match pattern '{DATASET_PATTERN}'": DATASET_RULE,
}
"""What the services and the client say, by what helps at a command line."""


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Ends the command with status 1 on our own errors and the storage's, 2 on wrong values."""
    try:
        yield
    except (SynthRepError, OSError) as error:
        typer.secho(f"synthrep: {_in_our_words(str(error))}", err=True, fg="red")
        raise typer.Exit(1) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = _in_our_words(first["msg"].removeprefix("Value error, "))
        typer.secho(": ".join(filter(None, ["synthrep", place, message])), err=True, fg="red")
        raise typer.Exit(2) from error
    except SettingsError as error:  # a variable that should hold JSON
        typer.secho(f"synthrep: {error}", err=True, fg="red")
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("synthrep: interrupted", err=True)
        raise typer.Exit(130) from None


def print_json(value: Any) -> None:
    """A model or plain data, indented."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    typer.echo(json.dumps(value, indent=1))


def print_table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
    *,
    spare: tuple[str, ...] = (),
) -> None:
    """A table for the terminal's width, as `fitted` makes it; whole where there is no terminal."""
    console = Console()
    table = fitted(console, columns, rows, spare=spare)
    table.title = title
    console.print(table, crop=False)


def fitted(
    console: Console,
    columns: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
    *,
    spare: tuple[str, ...] = (),
) -> Table:
    """A table whose first column, the ids, is never cut nor folded.

    Where it is wider than the terminal, `spare` columns are left out, the first first; what is
    still too wide is folded in the columns beside the ids. Where there is no terminal the console
    becomes as wide as the table.
    """
    kept, left_out = list(columns), []
    table = _table(columns, rows, kept)
    if not console.is_terminal:
        console.width = max(console.width, _natural_width(table))
    for name in spare:
        if _natural_width(table) <= console.width:
            break
        kept.remove(name)
        left_out.append(name)
        table = _table(columns, rows, kept)
    if left_out:
        table.caption = f"no room for {', '.join(left_out)}"
    return table


def short_number(value: float | None) -> str:
    """Three digits, as `0.123`, or a whole number from 1,000 on; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]], kept: Sequence[str]) -> Table:
    table = Table()
    places = [i for i, name in enumerate(columns) if name in kept]
    for i in places:
        longest = max((len(str(row[i])) for row in rows), default=0)
        table.add_column(
            columns[i], overflow="fold", no_wrap=i == 0, min_width=None if i else longest
        )
    for row in rows:
        table.add_row(*(Text(str(row[i])) for i in places))  # text, whatever brackets it has
    return table


def _natural_width(table: Table) -> int:
    """Characters that a table takes if nothing in it is folded."""
    endless = Console(width=10_000)
    return Measurement.get(endless, endless.options, table).maximum


def _in_our_words(message: str) -> str:
    for theirs, ours in _SAID_HERE.items():
        message = message.replace(theirs, ours)
    return message
