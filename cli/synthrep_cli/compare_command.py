"""`synthrep compare`: the table of a configuration, run by run, with a report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from synthrep_cli.output import Json, errors_in_one_sentence, print_json


def compare(
    config: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="TOML file, as in experiments/.")
    ],
    folder: Annotated[
        Path | None, typer.Option(help="Where services and report go; default: runs/NAME.")
    ] = None,
    rows: Annotated[
        Path, typer.Option(help="File of results; what has a line in it is not done again.")
    ] = Path("docs/experiments/rows.jsonl"),
    ablations: Annotated[bool, typer.Option(help="Do the configuration's ablations too.")] = False,
    as_json: Json = False,
) -> None:
    """Train the rows of a comparison, judge them, write the report. Call again to go on."""
    from synthrep_cli.comparison import Places, run_comparison
    from synthrep_cli.comparison_config import ComparisonError, read_comparison
    from synthrep_cli.comparison_report import write_reports
    from synthrep_cli.stack import sole_use

    console = Console(stderr=as_json)
    with errors_in_one_sentence():
        wanted = read_comparison(config)
        where = folder or Path("runs") / wanted.name
        places = Places(folder=where, rows=rows, config_folder=config.parent)
        parts = []
        with sole_use(where):
            for one in (wanted, *map(wanted.ablated, wanted.ablations if ablations else ())):
                console.print(f"[bold]{one.name}[/]")
                parts.append(run_comparison(one, places, console))
                summary = write_reports(parts, where)
        if as_json:
            print_json(summary.as_json())
        else:
            table = Table(title=f"{wanted.name}: mean over seeds, %")
            for column in ("row", *summary.means):
                table.add_column(column)
            for row in wanted.rows:
                cells = (means.get(row) for means in summary.means.values())
                table.add_row(row, *(f"{100 * c.mean:.1f}" if c else "–" for c in cells))
            console.print(table)
            console.print(f"The report: [link]{where / 'report.html'}[/]")
        failures = [failure for part in parts for failure in part.failures]
        if failures:
            raise ComparisonError(f"{len(failures)} runs failed, the first: {failures[0]}")
