"""`synthrep probe-sets …`: the labelled sets that probes may name, and how to add one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthrep_cli.output import Json, errors_in_one_sentence, print_json, print_table
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeSetView

app = typer.Typer(help="Look at labelled sets and add your own.", no_args_is_help=True)


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """Labelled sets, and what is wrong with those that cannot be read."""
    with errors_in_one_sentence(), SynthRep() as client:
        views = [ProbeSetView.model_validate(item) for item in client.probe_datasets()]
        if as_json:
            print_json([view.model_dump(mode="json") for view in views])
            return
        print_table(
            "labelled sets",
            ("name", "classes", "splits", "metric"),
            [
                (v.name, len(v.classes) if v.classes else "–", v.error or ", ".join(v.splits),
                 v.metric or "–")
                for v in views
            ],
        )  # fmt: skip


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the new set, for `synthrep probe`.")],
    source: Annotated[
        str, typer.Argument(help="Folder or zip of class/image, or of train and test with such.")
    ],
    on_server: Annotated[
        bool, typer.Option(help="The folder is the trainer's, and is read where it lies.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a labelled set; without splits, a fifth of each class is drawn for test."""
    with errors_in_one_sentence(), SynthRep() as client:
        if on_server:
            view = client.link_probe_dataset(name, source)
        else:
            view = client.add_probe_dataset(name, Path(source))
        if as_json:
            print_json(view)
            return
        classes = f"{len(view.classes)} classes, " if view.classes else ""
        typer.echo(f"{view.name}: {classes}{' and '.join(view.splits)}; judge on it: "
                   f"synthrep probe RUN --dataset {view.name}")  # fmt: skip
