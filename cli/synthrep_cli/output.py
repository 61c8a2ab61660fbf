"""How every command speaks: tables for people, JSON for programs, an error in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table

from synthrep_shared.errors import SynthRepError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Ends the command with status 1 on our own errors and the storage's, 2 on wrong values."""
    try:
        yield
    except (SynthRepError, OSError) as error:
        typer.secho(f"synthrep: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
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


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A table as wide as the terminal."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
