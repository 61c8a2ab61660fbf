"""`synthrep regenerate`: an image is made again, alone, from what its JSON says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ValidationError

from synthrep_cli.output import Json, errors_in_one_sentence, print_json
from synthrep_shared.client import SynthRep
from synthrep_shared.errors import SynthRepError
from synthrep_shared.samples import SampleMetadata

_TOLERANCE = 2.0  # of 255, the mean that other devices and batch shapes stay within
_SUFFIXES = (".jpg", ".png", ".webp")


def regenerate(
    gid: Annotated[str | None, typer.Argument(help="Id of the group.")] = None,
    image_index: Annotated[
        int | None, typer.Argument(metavar="[K]", min=0, help="Image of the group, from 0.")
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON of a shard, in place of GID and K; compared with the image beside it.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Where to save the image.")
    ] = None,
    batch_images: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Images in the device pass; none: as recorded."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an image again from its JSON and compare it with the stored one.

    It is bit for bit the same on the same kind of device and in a pass of as many images. Exit 1
    if it differs by more than 2/255 in the mean. The model must be on this machine.
    """
    if (sample is None) != (gid is not None and image_index is not None) or (sample and gid):
        raise typer.BadParameter("expected GID and K, or --sample FILE")
    with errors_in_one_sentence(), _worker_extra():
        if sample is not None:
            description, stored = _read_sample(sample)
        else:
            description, stored = _fetch(str(gid), int(image_index or 0))
        report = _remake(description, stored, batch_images, output)
    if as_json:
        print_json(report)
    else:
        typer.echo(_sentence(report))
    if report.mean_difference > _TOLERANCE:
        raise typer.Exit(1)


class _Report(BaseModel):
    """What is printed; differences in 1/255."""

    gid: str
    image_index: int
    equal: bool
    mean_difference: float
    max_difference: int
    batch_images: int
    device: str
    dtype: str


def _remake(
    sample: SampleMetadata, stored: bytes, batch_images: int | None, output: Path | None
) -> _Report:
    from synthrep_generator.regeneration import compare, encode_as_stored, remake
    from synthrep_generator.settings import GeneratorSettings

    settings = GeneratorSettings()
    remade = remake(sample, settings, batch_images=batch_images)
    image = encode_as_stored(remade.pixels, stored, sample, settings)
    if output is not None:
        output.write_bytes(image)
    found = compare(stored, image)
    return _Report(
        gid=sample.gid,
        image_index=sample.image_index,
        equal=found.is_equal,
        mean_difference=found.mean_difference,
        max_difference=found.max_difference,
        batch_images=batch_images or sample.batch_images,
        device=remade.device,
        dtype=remade.dtype,
    )


def _sentence(report: _Report) -> str:
    how = f"on {report.device} in {report.dtype}, in a pass of {report.batch_images}"
    name = f"image {report.image_index} of {report.gid}"
    if report.equal:
        return f"{name}: equal bit for bit, {how}"
    return (
        f"{name}: differs by {report.mean_difference:.4f}/255 in the mean, "
        f"{report.max_difference}/255 at most, {how}"
    )


def _fetch(gid: str, image_index: int) -> tuple[SampleMetadata, bytes]:
    """The description and the stored file, as the service has them."""
    with SynthRep() as client:
        group = client.group(gid)
        if image_index >= len(group.samples):
            raise SynthRepError(f"group {gid} has {len(group.samples)} images; they count from 0")
        return group.samples[image_index], client.image_bytes(gid, image_index)


def _read_sample(file: Path) -> tuple[SampleMetadata, bytes]:
    """The description in a file and the image beside it."""
    try:
        description = SampleMetadata.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise SynthRepError(f"{file} is no sample's JSON") from error
    images = [image for suffix in _SUFFIXES if (image := file.with_suffix(suffix)).is_file()]
    if not images:
        raise SynthRepError(f"no image beside {file}; expected {file.with_suffix('.jpg')}")
    return description, images[0].read_bytes()


@contextmanager
def _worker_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SynthRepError(
            f"this needs the model's libraries: pip install 'synthrep-generator[worker]' ({error})"
        ) from error
