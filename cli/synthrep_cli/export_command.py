"""`synthrep export`: a checkpoint's encoder in the formats of timm, Hugging Face and ONNX.

Reads the checkpoint's files itself, so that it works where nothing runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from synthrep_cli.folders import workplace_of
from synthrep_cli.output import Json, errors_in_one_sentence, print_json

_EXPORTS = Path("runs/exports")
_LOADING = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "hf": 'transformers.AutoModel.from_pretrained("{folder}")',
    "onnx": 'onnxruntime.InferenceSession("{folder}/model.onnx")',
}


def export(
    what: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run id, or a checkpoint's path.")
    ],
    format_name: Annotated[
        Literal["timm", "hf", "onnx"], typer.Option("--format", help="Whose format.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to make; default: runs/exports/<run>-<step>-<format>."),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs; default: SYNTHREP_TRAINER_RUNS, or runs/trainer, or that of "
            "`synthrep up`."
        ),
    ] = None,
    weights: Annotated[
        Literal["auto", "last", "ema"],
        typer.Option(help="Last or averaged; auto: averaged where the run has them."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Hand a trained encoder on, as a folder that needs no code of ours."""
    from synthrep_trainer.export import export_checkpoint, find_checkpoint

    with errors_in_one_sentence():
        checkpoint = find_checkpoint(what, workplace_of(runs, what))
        name = f"{checkpoint.path.absolute().parent.parent.name}-{checkpoint.step}-{format_name}"
        output = output or _EXPORTS / name
        made = export_checkpoint(checkpoint, output, format_name, weights=weights, replace=force)
    if as_json:
        print_json({"folder": str(made.folder), "greatest_difference": made.greatest_difference})
    else:
        typer.echo(
            f"{made.folder}  features within {made.greatest_difference:.1e} of the checkpoint's"
        )
        typer.echo(f"load it: {_LOADING[format_name].format(folder=made.folder)}")
