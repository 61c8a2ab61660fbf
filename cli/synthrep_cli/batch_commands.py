"""`synthrep batch …`: steer what was submitted, and see what cannot be made."""

from __future__ import annotations

from typing import Annotated

import typer

from synthrep_cli.output import Json, errors_in_one_sentence, print_json, print_table
from synthrep_shared.client import SynthRep

app = typer.Typer(help="Pause, resume and cancel batches; see failures.", no_args_is_help=True)

Batch = Annotated[str, typer.Argument(metavar="BATCH", help="Batch id, see `synthrep status`.")]


@app.command()
def pause(batch: Batch, as_json: Json = False) -> None:
    """Hold a batch back; jobs that run already end."""
    _control(batch, "pause", as_json=as_json)


@app.command()
def resume(batch: Batch, as_json: Json = False) -> None:
    """Let a paused batch go on."""
    _control(batch, "resume", as_json=as_json)


@app.command()
def cancel(batch: Batch, as_json: Json = False) -> None:
    """Give up what is not done yet, for good; images that are done stay."""
    _control(batch, "cancel", as_json=as_json)


@app.command()
def failures(batch: Batch, as_json: Json = False) -> None:
    """Captions that ended as failures, each with its reason."""
    with errors_in_one_sentence(), SynthRep() as client:
        views = list(client.failures(batch))
        if as_json:
            print_json([view.model_dump(mode="json") for view in views])
            return
        print_table(
            "failures",
            ("index", "caption", "reason", "attempts"),
            [(v.index, v.prompt, v.reason, v.attempts) for v in views],
        )


def _control(batch: str, verb: str, *, as_json: bool) -> None:
    with errors_in_one_sentence(), SynthRep() as client:
        view = client.control(batch, verb)
        if as_json:
            print_json(view)
            return
        counts = view.prompts
        typer.echo(
            f"{view.id}  {view.state}: {counts.committed} of {counts.accepted} captions committed, "
            f"{counts.failed} failed, {counts.cancelled} cancelled"
        )
