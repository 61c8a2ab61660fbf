"""`synthrep train` and `synthrep run …`: start training runs, list, show, stop and resume them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import httpx
import typer

from synthrep_cli.fields import run_fields
from synthrep_cli.output import Json, errors_in_one_sentence, print_json, print_table, short_number
from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError
from synthrep_shared.messages import RunRequest, RunView

app = typer.Typer(help="List, show, stop and resume training runs.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run id, see `synthrep run ls`.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """Training runs, the newest first."""
    with errors_in_one_sentence(), SynthRep() as client:
        views = list(client.runs())
        if as_json:
            print_json([view.model_dump(mode="json") for view in views])
            return
        print_table(
            "runs",
            ("id", "data set", "state", "step", "loss", "images/s"),
            [
                (v.id, source_of(v), v.state, f"{v.step}/{v.max_steps}", short_number(v.loss),
                 short_number(v.images_per_s))
                for v in views
            ],
            spare=("images/s", "loss"),
        )  # fmt: skip
        for note in waiting(views):
            typer.echo(note)


@app.command()
def show(run: Run, as_json: Json = False) -> None:
    """One run: where it is, and what it was asked for."""
    with errors_in_one_sentence(), SynthRep() as client:
        view = client.run(run)
        if as_json:
            print_json(view)
            return
        _say(view)
        for name, value in view.request.items():
            typer.echo(f"  {name} = {value}")


@app.command()
def stop(run: Run, as_json: Json = False) -> None:
    """Pause a run at a checkpoint, which makes room for the next; `resume` goes on from there."""
    _control(run, "stop", as_json=as_json)


@app.command()
def resume(run: Run, as_json: Json = False) -> None:
    """Go on with a run that was stopped or failed, from its newest checkpoint."""
    _control(run, "resume", as_json=as_json)


def source_of(view: RunView) -> str:
    """The data set of a run, or its address."""
    return str(view.request.get("dataset") or view.request.get("source_url"))


def waiting(views: Iterable[RunView]) -> list[str]:
    """A sentence for each run that waits for something."""
    return [f"{view.id} waits for {view.waiting_for}" for view in views if view.waiting_for]


def _control(run: str, verb: str, *, as_json: bool) -> None:
    with errors_in_one_sentence(), SynthRep() as client:
        view = client.control_run(run, verb)
        if as_json:
            print_json(view)
            return
        _say(view)
        if verb == "stop" and view.state == "running":
            typer.echo(f"it is paused once its checkpoint is written: synthrep run show {view.id}")


def _say(view: RunView) -> None:
    typer.echo(
        f"{view.id}  {view.state}: step {view.step} of {view.max_steps} on {source_of(view)}, "
        f"loss {short_number(view.loss)}"
    )
    if view.waiting_for:
        typer.echo(f"waits for {view.waiting_for}")
    if view.error:
        typer.echo(f"error: {view.error}")


def train(
    dataset: Annotated[str | None, typer.Option(help="Data set to follow; may be empty.")] = None,
    source_url: Annotated[str | None, typer.Option(help="Or its address, http://…/D.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file with fields of POST /v1/runs, or TOML recipe; goes before a preset.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published recipe, such as cc12m_vitb16_35ep.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, unless the file has max_images.")
    ] = None,
    captions_per_batch: Annotated[
        int | None, typer.Option(min=2, help="Captions a step; 64 unless a file says otherwise.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a training run."""
    with errors_in_one_sentence(), SynthRep() as client:
        given = {
            "dataset": dataset,
            "source_url": source_url,
            "max_steps": max_steps,
            "captions_per_batch": captions_per_batch,
        }
        fields = run_fields(preset, config) | {k: v for k, v in given.items() if v is not None}
        if not {"dataset", "source_url"} & fields.keys():
            raise typer.BadParameter("name what to train on", param_hint="--dataset")
        request = RunRequest.model_validate(fields)
        run = client.train(request)
        if as_json:
            print_json(run)
            return
        typer.echo(f"{run.id}  {run.state}; follow it: synthrep watch")
        if shortage := _shortage(request):
            typer.echo(shortage, err=True)  # so that a script that takes the id gets it alone


def _shortage(request: RunRequest) -> str:
    """What the first step has to wait for, in a sentence; empty where that is not known."""
    if request.dataset is None:
        return ""
    try:
        with SynthRep(retries=0) as client:  # a hint is worth no wait
            committed = client.dataset(request.dataset).groups
    except ServiceError as error:
        if error.status != httpx.codes.NOT_FOUND:
            return ""
        committed = 0
    wanted = max(request.captions_per_batch, request.min_fill_groups or 0)
    if committed >= wanted:
        return ""
    return (
        f"it begins when {wanted} captions have images, now {committed} have; "
        "--captions-per-batch takes fewer"
    )
