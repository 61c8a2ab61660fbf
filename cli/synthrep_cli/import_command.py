"""`synthrep import`: an encoder that the authors published, as a run that can be probed.

Works on files only, in the folder of runs; the services need not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthrep_cli.folders import workplaces
from synthrep_cli.output import Json, errors_in_one_sentence, print_json
from synthrep_shared.presets import load_preset


def import_encoder(
    file: Annotated[Path, typer.Argument(help="A .pth file of StableRep or SynCLR.")],
    preset: Annotated[
        str | None,
        typer.Option(help="Recipe that it was trained by, which states the published numbers."),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Name for the images that it was trained on.")
    ] = "published",
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs; default: SYNTHREP_TRAINER_RUNS, or runs/trainer, or that of "
            "`synthrep up`."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a published encoder here, as a completed run for `synthrep probe` and `export`."""
    from synthrep_trainer.published import import_published

    with errors_in_one_sentence():
        recipe = load_preset(preset) if preset else None
        place = workplaces(runs)[-1]
        fields = recipe.request if recipe else None
        run = import_published(file, place, dataset=dataset, recipe=fields)
        model = run.record.request.model
    expected = recipe.expected if recipe else []
    if as_json:
        published = [number.model_dump() for number in expected]
        print_json({"run": run.id, "model": model, "expected": published})
        return
    typer.echo(f"{run.id}  {model}")
    for number in expected:
        typer.echo(f"published: {number.dataset}, {number.protocol}: {number.value:.1%}")
