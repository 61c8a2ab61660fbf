"""The command `synthrep`: one verb per thing that people do; speaks to the services over REST."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.text import Text

from synthrep_cli import (
    batch_commands,
    compare_command,
    dataset_commands,
    doctor,
    export_command,
    import_command,
    models_commands,
    probe_sets_commands,
    regenerate_command,
    run_commands,
)
from synthrep_cli import prompts as prompt_files
from synthrep_cli.fields import parse_fields
from synthrep_cli.folders import UP
from synthrep_cli.output import (
    Json,
    errors_in_one_sentence,
    fitted,
    print_json,
    print_table,
    short_number,
)
from synthrep_cli.probe_table import ProbeRow, probe_table
from synthrep_shared.client import SynthRep
from synthrep_shared.errors import SynthRepError
from synthrep_shared.messages import (
    MAX_PROMPTS_PER_REQUEST,
    BatchView,
    MixtureComponent,
    ProbeRequest,
    QualityGate,
    RunView,
)

app = typer.Typer(
    help="Train vision encoders on images that are being generated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(batch_commands.app, name="batch")
app.add_typer(dataset_commands.app, name="dataset")
app.add_typer(models_commands.app, name="models")
app.add_typer(probe_sets_commands.app, name="probe-sets")
app.add_typer(run_commands.app, name="run")

_WATCH_S = 1.0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"synthrep {metadata.version('synthrep')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where runs and reports go.")] = Path("runs/demo"),
    captions: Annotated[int, typer.Option(min=64, max=380, help="Captions to draw.")] = 240,
    max_images: Annotated[int, typer.Option(min=512, help="Views to train on.")] = 64_000,
) -> None:
    """The whole loop on this machine: captions, images, shards, training, probes, report."""
    from synthrep_cli.demo import DemoConfig, load_captions, run_demo
    from synthrep_cli.stack import sole_use
    from synthrep_generator.settings import GeneratorSettings

    with errors_in_one_sentence():
        path = GeneratorSettings().models["tiny"].path / "captions.tsv"
        config = DemoConfig(folder=folder, captions=captions, max_images=max_images)
        with sole_use(folder):
            run_demo(config, load_captions(path, captions), Console())


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=0, help="GPU workers.")] = 1,
    redis: Annotated[str | None, typer.Option(help="URL of a Redis; none: embedded.")] = None,
    folder: Annotated[Path, typer.Option(help="Where data, runs and logs go.")] = UP,
) -> None:
    """All services in this terminal, until Ctrl-C."""
    from synthrep_cli.stack import Stack, StackConfig, sole_use

    config = StackConfig(
        folder=folder.absolute(), workers=workers, redis_url=redis,
        generator_port=8000, trainer_port=8001,
    )  # fmt: skip
    with errors_in_one_sentence(), sole_use(config.folder), Stack(config) as stack:
        stack.wait_ready(typer.echo)
        typer.echo(f"page       {stack.trainer_url}/")
        typer.echo(f"generator  {stack.generator_url}/openapi.json")
        typer.echo(f"trainer    {stack.trainer_url}/openapi.json")
        typer.echo(f"files      {config.folder}\nCtrl-C stops everything")
        while True:
            stack.check()
            time.sleep(_WATCH_S)


@app.command()
def submit(
    file: Annotated[str, typer.Argument(help="txt, csv, tsv or ndjson, also .gz; - is stdin.")],
    dataset: Annotated[str, typer.Option(help="Data set to add to.")],
    model: Annotated[str, typer.Option(help="Alias, see `synthrep models ls`.")] = "tiny",
    images_per_prompt: Annotated[
        int, typer.Option(min=1, max=64, help="Images of each caption: positives of each other.")
    ] = 10,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, max=30, help="Low: images of a caption differ; none: model's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes the same images again; none: other ones.")
    ] = None,
    quality_gate: Annotated[
        str | None,
        typer.Option(help="Makes poor images again: on, or safety=true,min_clip_score=0.2 …"),
    ] = None,
    mixture: Annotated[
        list[str] | None,
        typer.Option(help="One way to make images, several times: model=sd15,weight=2 …"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand in captions; each becomes a group of images."""
    settings = {
        "model": model, "images_per_prompt": images_per_prompt,
        "guidance_scale": guidance_scale, "seed": seed,
    }  # fmt: skip
    given: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    if quality_gate is not None:
        gate = parse_fields(quality_gate, QualityGate, option="--quality-gate")
        given["quality_gate"] = gate.model_dump()
    if mixture:
        parts = [parse_fields(m, MixtureComponent, option="--mixture") for m in mixture]
        given["mixture"] = [part.model_dump() for part in parts]
    with errors_in_one_sentence(), SynthRep() as client:
        texts = prompt_files.read(file)
        if not texts:
            raise SynthRepError(f"{file} holds no captions; expected one a line")
        accepted = [
            client.submit(dataset, texts[i : i + MAX_PROMPTS_PER_REQUEST], **given)
            for i in range(0, len(texts), MAX_PROMPTS_PER_REQUEST)
        ]
        if as_json:
            print_json([a.model_dump(mode="json") for a in accepted])
            return
        for batch in accepted:
            typer.echo(f"{batch.id}  {batch.prompts_accepted} captions accepted")
        typer.echo(f"follow them: synthrep watch, or synthrep status {accepted[-1].id}")


@app.command()
def status(
    batch: Annotated[str | None, typer.Argument(help="Batch id; none: all.")] = None,
    as_json: Json = False,
) -> None:
    """Where the captions are."""
    with errors_in_one_sentence(), SynthRep() as client:
        views = [client.batch(batch)] if batch else list(client.batches())
        if as_json:
            print_json([v.model_dump(mode="json") for v in views])
            return
        print_table(
            "batches",
            ("id", "data set", "state", "captions", "queued", "running", "failed", "images",
             "images/s", "ETA s"),
            [
                (v.id, v.dataset, v.state, f"{v.prompts.committed}/{v.prompts.accepted}",
                 v.prompts.queued, v.prompts.running, v.prompts.failed, v.images_committed,
                 short_number(v.images_per_s), short_number(v.eta_s))
                for v in views
            ],
            spare=("running", "queued", "images/s", "images", "ETA s", "failed"),
        )  # fmt: skip


@app.command()
def watch() -> None:
    """Batches and runs, live, until Ctrl-C."""
    from rich.live import Live

    console = Console()
    with (
        errors_in_one_sentence(),
        SynthRep() as client,
        _line_at_end(console),
        Live(console=console, refresh_per_second=2) as live,
    ):
        while True:
            rows = [_batch_row(b) for b in client.batches()]
            runs = list(client.runs())
            rows += [_run_row(run) for run in runs]
            table = fitted(console, _WATCHED, rows, spare=("loss", "speed", "what"))
            live.update(Group(table, *map(Text, run_commands.waiting(runs))))
            time.sleep(_WATCH_S)


_WATCHED = ("id", "what", "data set", "state", "progress", "speed", "loss")


def _batch_row(batch: BatchView) -> tuple[str, ...]:
    decided = batch.prompts.committed + batch.prompts.failed
    return (batch.id, "batch", batch.dataset, batch.state,
            f"{decided}/{batch.prompts.accepted} captions",
            f"{short_number(batch.images_per_s)} images/s", "")  # fmt: skip


def _run_row(run: RunView) -> tuple[str, ...]:
    return (run.id, "run", run_commands.source_of(run), run.state,
            f"step {run.step}/{run.max_steps}",
            f"{short_number(run.images_per_s)} images/s", short_number(run.loss))  # fmt: skip


@contextmanager
def _line_at_end(console: Console) -> Iterator[None]:
    """Where there is no terminal, a live table leaves its last line open."""
    try:
        yield
    finally:
        if not console.is_terminal:
            console.line()


@app.command()
def probe(
    what: Annotated[str, typer.Argument(help="Run id, or a checkpoint's path.")],
    dataset: Annotated[str, typer.Option(help="Labelled set, see `synthrep probe-sets ls`.")],
    protocol: Annotated[
        str, typer.Option(help="linear, knn, fewshot or imagenet-linear.")
    ] = "linear",
    as_json: Json = False,
) -> None:
    """Judge frozen features on a labelled set, and wait for the result."""
    with errors_in_one_sentence(), SynthRep() as client:
        key = "checkpoint" if "/" in what else "run_id"
        request = ProbeRequest.model_validate({key: what, "dataset": dataset, "protocol": protocol})
        view = client.start_probe(request)
        while view.state in ("queued", "running"):
            time.sleep(_WATCH_S)
            view = client.probe(view.id)
        if view.state != "completed":
            raise SynthRepError(f"the probe failed: {view.error}")
        if as_json:
            print_json(view)
            return
        Console().print(probe_table([ProbeRow.from_view(view)]))


app.command()(compare_command.compare)
app.command()(doctor.doctor)
app.command()(export_command.export)
app.command("import")(import_command.import_encoder)
app.command()(regenerate_command.regenerate)
app.command()(run_commands.train)


if __name__ == "__main__":
    app()
