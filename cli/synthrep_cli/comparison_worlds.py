"""The images that a comparison trains on: generated ones over REST, real ones imported.

Both become data sets of the same kind under names that say what is in them, so that what is there
already is taken as it is, and what was cut off goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from synthrep_cli.comparison_config import Comparison, ComparisonError, RealWorld, digest
from synthrep_cli.stack import Stack
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import BatchView
from synthrep_shared.storage import DatasetPaths

_PROMPTS_PER_BATCH = 96
_POLL_S = 1.0
_IMAGES = ("jpg", "png", "webp")


@dataclass(frozen=True)
class RealSource:
    """Where real images come from: tars, each with a name, its classes, and whether `.cls` tells
    the class or the first part of a member's name."""

    kind: str
    """`photos` or `drawings`."""
    tars: tuple[tuple[str, Path, Path, bool], ...]


def captions_of(config: Comparison, folder: Path) -> list[str]:
    """The captions to generate from; raises ComparisonError if there are too few."""
    from synthrep_cli.demo import load_captions
    from synthrep_generator.settings import GeneratorSettings

    world = config.generated
    path = folder / world.captions
    if not world.captions:
        model = GeneratorSettings().models.get(world.model)
        if model is None:
            raise ComparisonError(f"there is no model {world.model!r}")
        path = model.path / "captions.tsv"
    if not path.is_file():
        raise ComparisonError(f"{path} is missing; name a file in generated.captions")
    captions = load_captions(path, world.num_captions)
    if len(captions) < world.num_captions:
        raise ComparisonError(f"{path} holds {len(captions)} captions, not {world.num_captions}")
    return captions


def real_source(world: RealWorld, probe_data: str | None) -> RealSource:
    """The archive, where it is there, else the train parts of the sets that travel."""
    from synthrep_trainer.probe_data import BUILT_IN, ProbeDataset

    archive = Path(probe_data or "", world.archive)
    if probe_data and world.archive and archive.is_file():
        stem = archive.name.partition(".")[0]
        classes = archive.with_name(f"{stem}.classes.txt")
        return RealSource("photos", ((stem, archive, classes, False),))
    sets = [ProbeDataset(name, BUILT_IN / name) for name in world.probe_sets]
    tars = tuple((s.name, s.path("train"), s.folder / "classes.txt", True) for s in sets)
    return RealSource("drawings", tars)


def real_name(world: RealWorld, source: RealSource) -> str:
    """Name of the data set of real images, by what is in it."""
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for _, path, _, _ in source.tars]
    fields = [world.max_images, world.templates, source.kind, sums]
    return f"real-{digest(fields)}"


def import_real(world: RealWorld, source: RealSource, paths: DatasetPaths, scratch: Path) -> int:
    """Import the images with captions made of their classes; returns how many there are.

    Raises StorageError, ComparisonError. Nothing is done twice.
    """
    from synthrep_generator.image_folder import find_images
    from synthrep_generator.importer import import_images

    shutil.rmtree(scratch, ignore_errors=True)
    for name, tar, classes, has_labels in source.tars:
        _unpack(tar, scratch / name, classes.read_text("utf-8").splitlines(), world, has_labels)
    found = find_images(scratch)
    step = max(1.0, len(found) / world.max_images)
    count = min(len(found), world.max_images)
    found = [found[int(i * step)] for i in range(count)]
    report = import_images(found, paths, threads=1)
    shutil.rmtree(scratch)
    return report.images


def _unpack(
    path: Path, folder: Path, classes: Sequence[str], world: RealWorld, has_labels: bool
) -> None:
    """Write images under names of our own, each with its caption beside it."""
    folder.mkdir(parents=True)
    with tarfile.open(path) as tar:
        for member in tar:
            stem, _, suffix = Path(member.name).name.partition(".")
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None or suffix not in (*_IMAGES, "cls"):
                continue
            data = stream.read()
            number = hashlib.sha256(stem.encode()).hexdigest()[:16]
            if suffix in _IMAGES:
                (folder / f"{number}.{suffix}").write_bytes(data)
            if has_labels == (suffix == "cls"):
                label = data.decode().strip() if has_labels else stem.partition("-")[0]
                if not label.isdecimal() or int(label) >= len(classes):
                    raise ComparisonError(f"{path}: {member.name} is of no class of classes.txt")
                template = world.templates[int(number, 16) % len(world.templates)]
                text = template.format(classes[int(label)].strip())
                (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def submit_captions(client: SynthRep, config: Comparison, captions: Sequence[str]) -> list[str]:
    """Ask for the images, once, however often this is called; returns the ids of the batches."""
    world, name = config.generated, config.generated_name(captions)
    settings = {"model": world.model, "images_per_prompt": world.images_per_caption,
                "guidance_scale": world.guidance_scale, "seed": world.seed}  # fmt: skip
    return [
        client.submit(
            name, captions[i : i + _PROMPTS_PER_BATCH], idempotency_key=f"{name}-{i}", **settings
        ).id
        for i in range(0, len(captions), _PROMPTS_PER_BATCH)
    ]


def wait_for_images(
    client: SynthRep, stack: Stack, batches: Sequence[str], show: Callable[[int, int], object]
) -> None:
    """Until every caption has its images; `show` is told how many have, and of how many.

    Raises ComparisonError if one failed: rows would not train on the same captions.
    """
    while True:
        stack.check()
        views: list[BatchView] = [client.batch(batch) for batch in batches]
        done = sum(v.prompts.committed for v in views)
        lost = sum(v.prompts.failed + v.prompts.cancelled for v in views)
        show(done, sum(v.prompts.accepted for v in views))
        if lost:
            raise ComparisonError(f"{lost} captions have no images; see GET /v1/batches")
        if done == sum(v.prompts.accepted for v in views):
            return
        time.sleep(_POLL_S)


def probe_data_folder() -> str | None:
    """The folder of labelled sets that the services will see."""
    return os.environ.get("SYNTHREP_PROBE_DATA") or None
