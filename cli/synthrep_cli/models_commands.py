"""`synthrep models …`: which text-to-image models there are, and how their files come here.

Both commands look at this machine's configuration and model cache; only `pull` goes to a hub.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from synthrep_cli.output import Json, errors_in_one_sentence, print_json, print_table
from synthrep_shared.errors import SynthRepError

if TYPE_CHECKING:
    from synthrep_generator import model_hub

app = typer.Typer(help="Look at text-to-image models and bring them here.", no_args_is_help=True)

_MEGABYTE = 1e6


class ModelRow(BaseModel):
    """A model by alias: `state` is here, damaged or not pulled."""

    alias: str
    state: str
    licence: str
    megabytes: float | None
    source: str
    revision: str | None


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """Text-to-image models by alias, and whether their files are here."""
    with errors_in_one_sentence():
        rows = _rows()
        if as_json:
            print_json([row.model_dump() for row in rows])
            return
        print_table(
            "models",
            ("alias", "state", "MB", "licence", "source"),
            [(r.alias, r.state, _megabytes(r), r.licence, r.source) for r in rows],
        )


@app.command("pull")
def pull(
    alias: Annotated[str, typer.Argument(help="Alias of the catalogue, see `synthrep models ls`.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is here and compare its hashes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a model's files from the hub into the model cache; goes on where it was cut off.

    HF_ENDPOINT names another hub, HF_TOKEN lets in where a licence was accepted.
    """
    from synthrep_generator.model_catalogue import CATALOGUE
    from synthrep_generator.model_hub import pull_model
    from synthrep_generator.settings import GeneratorSettings

    with errors_in_one_sentence():
        entry = CATALOGUE.get(alias)
        if entry is None:
            raise SynthRepError(f"no such alias; the catalogue has {', '.join(CATALOGUE)}")
        cache = GeneratorSettings().model_cache
        if not as_json:
            typer.echo(f"{alias}: {entry.repo}\nlicence: {entry.licence}")
        with _progress(quiet=as_json) as progress:
            manifest, is_new = pull_model(alias, entry, cache, verify=verify, progress=progress)
        if as_json:
            print_json(manifest)
            return
        size = f"{manifest.num_bytes / _MEGABYTE:,.1f} MB in {len(manifest.files)} files"
        typer.echo(f"revision {manifest.revision}, {size}")
        typer.echo(f"pulled into {cache.expanduser() / alias}" if is_new else "up to date")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[model_hub.Progress]:
    """A bar of the file at hand on a terminal, else a line for each file."""
    from synthrep_generator import model_hub

    if quiet:
        yield model_hub.Progress()
    elif not sys.stdout.isatty():
        yield model_hub.Progress(on_file=lambda name, size: typer.echo(f"{name}  {size} bytes"))
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                   TransferSpeedColumn())  # fmt: skip
        with Progress(*columns, console=Console()) as bars:
            task = bars.add_task("")
            yield model_hub.Progress(
                on_file=lambda name, size: bars.reset(task, description=name, total=size),
                on_bytes=lambda count: bars.advance(task, count),
            )


def _rows() -> list[ModelRow]:
    from synthrep_generator.errors import ModelFilesMissingError
    from synthrep_generator.model_catalogue import CATALOGUE
    from synthrep_generator.model_files import read_manifest, wrong_sizes
    from synthrep_generator.settings import GeneratorSettings

    settings = GeneratorSettings()
    rows = []
    for alias, model in settings.models.items():
        if alias not in CATALOGUE:
            state = "here" if model.path.is_dir() else "absent"
            size = sum(f.stat().st_size for f in model.path.rglob("*") if f.is_file())
            rows.append(
                ModelRow(alias=alias, state=state, licence=model.licence, source=str(model.path),
                         megabytes=size / _MEGABYTE, revision=model.revision)
            )  # fmt: skip
    for alias, entry in CATALOGUE.items():
        folder = settings.model_cache.expanduser() / alias
        manifest, state, size_mb = None, "not pulled", None
        try:
            manifest = read_manifest(folder)
        except ModelFilesMissingError:
            state = "damaged"
        if manifest is not None:
            state = "damaged" if wrong_sizes(folder, manifest) else "here"
            size_mb = manifest.num_bytes / _MEGABYTE
        rows.append(
            ModelRow(alias=alias, state=state, licence=entry.licence, source=entry.repo,
                     megabytes=size_mb, revision=manifest.revision if manifest else entry.revision)
        )  # fmt: skip
    return rows


def _megabytes(row: ModelRow) -> str:
    return "" if row.megabytes is None else f"{row.megabytes:,.1f}"
