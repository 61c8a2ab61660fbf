"""`synthrep dataset …`: what there is, whether it is whole, how to bring it in order or in.

`ls` asks the service. The others read the files themselves, so that they work where
nothing runs, and while everything does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from synthrep_cli.folders import dataset_paths
from synthrep_cli.output import Json, errors_in_one_sentence, print_json, print_table
from synthrep_shared.client import SynthRep

app = typer.Typer(help="Look at data sets, check and repair them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="DATASET", help="Name of the data set.")]
Root = Annotated[
    str | None,
    typer.Option(
        help="Folder or s3://bucket/prefix of the data sets; "
        "default: SYNTHREP_GENERATOR_ROOT, or runs/data, or that of `synthrep up`."
    ),
]
MinAge = Annotated[
    float, typer.Option(min=0, help="Seconds after which an unfinished file is left over.")
]
_JOB_LIMIT_S = 600.0  # no job writes for longer


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """Data sets and their size."""
    with errors_in_one_sentence(), SynthRep() as client:
        views = list(client.datasets())
        if as_json:
            print_json([v.model_dump(mode="json") for v in views])
            return
        print_table(
            "data sets",
            ("name", "shards", "captions", "images", "MB"),
            [(v.name, v.shards, v.groups, v.images, round(v.bytes / 1e6, 1)) for v in views],
        )


@app.command("verify")
def verify(
    dataset: Name, root: Root = None, min_age: MinAge = _JOB_LIMIT_S, as_json: Json = False
) -> None:
    """Compare intake, commit log and shards; exit 1 if anything is damaged or left over.

    Prompts that are still undecided are reported, and are no fault.
    """
    from synthrep_generator.verify import verify_dataset

    with errors_in_one_sentence():
        report = verify_dataset(dataset_paths(root, dataset), now_s=time.time(), min_age_s=min_age)
    if as_json:
        print_json(report)
    else:
        typer.echo(
            f"{dataset}: {report.accepted} prompts accepted = {report.committed} committed + "
            f"{report.failed} failed + {report.cancelled} cancelled + {report.undecided} undecided"
        )
        typer.echo(f"{report.shards} shards, {report.images} images, {report.bytes} bytes")
        for damage in report.damage:
            typer.echo(f"{damage.kind:8} {damage.file}: {damage.detail}")
        for name in report.leftovers:
            typer.echo(f"leftover {name}")
        if report.torn_bytes:
            typer.echo(f"the log ends with {report.torn_bytes} bytes of a torn line")
        if report.duplicated:
            typer.echo(f"{report.duplicated} outcomes of prompts that had one")
        if report.is_clean:
            typer.echo("nothing is missing, damaged or left over")
        elif report.is_sound:
            typer.echo(f"committed data is whole; clean up: synthrep dataset repair {dataset}")
    if not report.is_clean:
        raise typer.Exit(1)


@app.command("repair")
def repair(
    dataset: Name, root: Root = None, min_age: MinAge = _JOB_LIMIT_S, as_json: Json = False
) -> None:
    """Remove orphans and old temporary files, cut a torn log line; committed data stays.

    Safe while the services run. Exit 1 if the log cannot be read; nothing is removed then.
    """
    from synthrep_generator.repair import repair_dataset

    with errors_in_one_sentence():
        repairs = repair_dataset(dataset_paths(root, dataset), now_s=time.time(), min_age_s=min_age)
    if as_json:
        print_json(repairs)
        return
    for name in repairs.removed:
        typer.echo(f"removed {name}")
    if repairs.cut_bytes:
        typer.echo(f"cut {repairs.cut_bytes} bytes of a torn line off the log")
    if not repairs.removed and not repairs.cut_bytes:
        typer.echo("nothing to repair")


@app.command("import")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="WebDataset tars, or a tree of images.")],
    dataset: Annotated[str, typer.Option(help="Name of the data set to make or extend.")],
    root: Root = None,
    each_its_own: Annotated[
        bool, typer.Option(help="Every image is a caption of its own, as for simclr.")
    ] = False,
    owner: Annotated[str, typer.Option(help="Name of the key that the batch belongs to.")] = "",
    threads: Annotated[int, typer.Option(min=1, max=64)] = 2,
    as_json: Json = False,
) -> None:
    """Copy images that exist into a data set, so that they train as generated ones do.

    Captions are those of .txt, .json or .cls beside an image, else the name of its folder. Every
    image is decoded once; those that cannot be are recorded as failures. Goes on where it was
    cut off; a folder that changed meanwhile is imported whole once more.
    """
    from synthrep_generator.image_folder import find_images
    from synthrep_generator.importer import import_images
    from synthrep_shared.keys import ANONYMOUS

    with errors_in_one_sentence():
        paths = dataset_paths(root, dataset, is_new=True)
        found = find_images(folder, caption_by="file" if each_its_own else "text")
        captions = len({image.caption for image in found})
        with _bar(len(found), quiet=as_json) as advance:
            report = import_images(
                found, paths, owner=owner or ANONYMOUS, threads=threads,
                advance=advance,
            )  # fmt: skip
    if as_json:
        print_json(report)
        return
    typer.echo(
        f"{dataset}: {report.images} images of {captions} captions = {report.imported} imported + "
        f"{report.refused} refused + {report.earlier} decided before"
    )
    if report.refused:
        typer.echo(f"why: synthrep batch failures {report.batch}")


@contextmanager
def _bar(total: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere."""
    if quiet or not sys.stdout.isatty():
        yield lambda count: None
        return
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console()
    ) as bars:
        task = bars.add_task("", total=total)
        yield lambda count: bars.advance(task, count)
