"""One job, from captions to a sealed shard: `generate_shard(request)`.

What a request asks for and is decided already is left out, before the work and again under the
log's lock, so a job may run any number of times, anywhere, at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.dataset_files import DatasetFiles
from synthrep_generator.errors import IntakeError, PermanentPromptError
from synthrep_generator.failure_writer import record_failures
from synthrep_generator.quality_gate import Candidate, Gate, Judges
from synthrep_generator.settings import ModelConfig
from synthrep_generator.shard_writer import Member, ShardWriter, encode_image, publish_shard
from synthrep_generator.shelf import Group, Shelf, Shot
from synthrep_generator.synthesis import (
    ImageTask,
    PendingImages,
    Pixels,
    Synthesizer,
    recipe_from_settings,
)
from synthrep_shared.commit_log import GroupRef
from synthrep_shared.errors import AlreadyDecidedError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.samples import SampleMetadata, caption_id, member_name

_ENCODERS = 2  # threads; encoding costs a small part of what the device needs for an image


class JobStoppedError(Exception):
    """The job is to end now; what is complete is sealed, or dropped if `discard`."""

    def __init__(self, *, discard: bool) -> None:
        super().__init__("job stopped")
        self.discard = discard


class Watch(Protocol):
    """Hears of a job's progress; may raise JobStoppedError."""

    def begin(self, places: Sequence[Place]) -> None:
        """A pass through the device starts that makes images of these prompts; none: it is over."""
        ...

    def step(self) -> None:
        """A step of the pass is done."""
        ...


@dataclass(frozen=True)
class ShardRequest:
    """Groups of one data set with equal settings that had no outcome when the request was made."""

    files: DatasetFiles
    settings: GenerationSettings
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Bench:
    """What a job works with."""

    synthesizer: Synthesizer
    model: ModelConfig
    image_format: str
    quality: int
    watch: Watch
    judges: Judges = field(default_factory=Judges)


class JobResult(BaseModel):
    """What a job decided, in prompts, the images it committed, and those refused, by check."""

    model_config = ConfigDict(frozen=True)

    committed: int = 0
    failed: int = 0
    images: int = 0
    filtered: dict[str, int] = {}


def make_request(chunk: Chunk, files: DatasetFiles) -> ShardRequest | None:
    """The undecided prompts of a chunk; None if there are none. IntakeError if settings differ."""
    files.log.refresh()
    settings: GenerationSettings | None = None
    groups = []
    for part in chunk.parts:
        reader = files.reader(part.batch)
        header = reader.header
        for index, prompt in enumerate(reader.prompts(part.start, part.count), part.start):
            own = header.settings_of(index)
            settings = settings or own
            if own != settings:
                raise IntakeError(f"chunk {chunk.id} mixes prompts of different settings")
            if files.log.outcomes.is_decided(part.batch, index):
                continue
            place, gid = Place(part.batch, index), header.gid(index, prompt)
            groups.append(Group(place, gid, prompt, settings.images_per_prompt, settings.seed))
    return ShardRequest(files, settings, tuple(groups)) if settings and groups else None


def generate_shard(request: ShardRequest, bench: Bench) -> JobResult:
    """Make the images, seal one shard, commit it and the prompts that cannot succeed.

    Raises OSError or SynthRepError where the place is to blame and the job may succeed later, and
    whatever the synthesizer raises. Stopped by the watch, it commits the groups that are complete.
    """
    encode = partial(_members, settings=request.settings, bench=bench)
    folder = request.files.paths.temporary
    with ShardWriter(folder) as writer, ThreadPoolExecutor(_ENCODERS) as pool:
        run = _Run(request, bench, Shelf(request.groups, writer, pool, encode))
        try:
            run.make_images()
        except JobStoppedError as stop:
            if stop.discard:
                return JobResult()
        run.shelf.finish()
        bench.watch.begin(())
        sealed = seal(request, writer)
    failed = record_failures(request.files.paths, request.files.log, run.shelf.failures)
    images = len(sealed) * request.settings.images_per_prompt
    return JobResult(
        committed=len(sealed), failed=failed, images=images, filtered=dict(run.filtered)
    )


_Made = tuple[Shot, Pixels, int]  # and the images of the device pass


class _Run:
    """Passes of one job through the device, until each image is kept or its prompt given up."""

    def __init__(self, request: ShardRequest, bench: Bench, shelf: Shelf) -> None:
        self._bench, self.shelf = bench, shelf
        self._recipe = recipe_from_settings(request.settings)
        self._shots = [Shot(group, k) for group in request.groups for k in range(group.num_images)]
        asked = request.settings.quality_gate
        self._gate = Gate(asked, bench.judges, capacity=len(self._shots)) if asked else None
        self._begun: tuple[Sequence[Shot], PendingImages] | None = None
        self.filtered: Counter[str] = Counter()

    def make_images(self) -> None:
        """First all images in canonical order, then those refused, together, with other seeds."""
        shots = self._shots
        while shots:
            refused, start = list[Shot](), 0
            while start < len(shots):
                stop = start + self._bench.synthesizer.batch_images
                refused += self._pass(shots[start:stop])
                start = stop
            refused += self._take()
            shots = [shot.again() for shot in refused if not self.shelf.is_given_up(shot.group)]

    def _pass(self, shots: Sequence[Shot]) -> list[Shot]:
        """Give the device a pass, and take the one before; returns the shots that were refused."""
        bench = self._bench
        tasks = [ImageTask(shot.group.prompt, shot.seed) for shot in shots]
        try:
            bench.watch.begin(list(dict.fromkeys(shot.group.place for shot in shots)))
            pending = bench.synthesizer.start(tasks, self._recipe, bench.watch.step)
        finally:  # also where the job is stopped: those images are made
            refused = self._take()
        self._begun = (shots, pending)
        return refused + self._take() if pending.is_ready else refused

    def _take(self) -> list[Shot]:
        """Wait for the images of the pass that was begun; returns the shots that were refused."""
        if self._begun is None:
            return []
        (shots, pending), self._begun = self._begun, None
        shelf, made = self.shelf, list[_Made]()
        for shot, result, size in zip(shots, pending.results(), pending.shared_by, strict=True):
            if isinstance(result, PermanentPromptError):
                shelf.give_up(shot, str(result))
            else:
                made.append((shot, result, size))
        kept, refused = self._judge(made)
        for shot, pixels, size in kept:
            if pixels.min() == pixels.max():
                shelf.give_up(shot, "blank image: every pixel has the same value")
            else:
                shelf.put(shot, pixels, size)
        shelf.write()
        return refused

    def _judge(self, made: list[_Made]) -> tuple[list[_Made], list[Shot]]:
        """What the gate lets pass, and what is to be made again; at the limit it fails."""
        if self._gate is None:
            return made, []
        shown = [Candidate(p, s.group.prompt, s.group.place.batch) for s, p, _ in made]
        kept, refused = [], []
        for image, refusal in zip(made, self._gate.review(shown), strict=True):
            shot = image[0]
            if refusal is None:
                kept.append(image)
                continue
            self.filtered[refusal.check] += 1
            if shot.attempt + 1 < self._gate.max_attempts:
                refused.append(shot)
            else:
                self.shelf.give_up(shot, f"filtered: {refusal.reason}")
        return kept, refused


def _members(
    shot: Shot, pixels: Pixels, batch_images: int, *, settings: GenerationSettings, bench: Bench
) -> list[Member]:
    """The stored image and its description."""
    gid, k, suffix = shot.group.gid, shot.image_index, bench.image_format
    description = _metadata(shot, batch_images, settings=settings, bench=bench)
    text = json.dumps(description.model_dump(), sort_keys=True).encode()
    image = encode_image(pixels, image_format=suffix, quality=bench.quality)
    return [(member_name(gid, k, suffix), image), (member_name(gid, k, "json"), text)]


def _metadata(
    shot: Shot, batch_images: int, *, settings: GenerationSettings, bench: Bench
) -> SampleMetadata:
    group, synthesizer, recipe = shot.group, bench.synthesizer, recipe_from_settings(settings)
    return SampleMetadata(
        caption=group.prompt,
        caption_id=caption_id(group.prompt),
        gid=group.gid,
        image_index=shot.image_index,
        seed=shot.seed,
        attempt=shot.attempt,
        model=settings.model,
        model_revision=synthesizer.revision,
        scheduler=recipe.scheduler,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        negative_prompt=recipe.negative_prompt,
        stored_px=bench.model.store_px,
        image_quality=None if bench.image_format == "png" else bench.quality,
        generator_version=_generator_version(),
        dtype=synthesizer.dtype,
        batch_images=batch_images,
        loras=bench.model.lora_names,
        caption_truncated=synthesizer.caption_fit(group.prompt).is_truncated,
    )


@cache
def _generator_version() -> str:
    return version("synthrep-generator")


def seal(request: ShardRequest, writer: ShardWriter) -> list[str]:
    """Commit the written groups except those that got an outcome meanwhile; returns their ids."""
    if not writer.gids:
        return []
    written = writer.finish()
    refs = {
        group.gid: GroupRef(
            gid=group.gid,
            caption_id=caption_id(group.prompt),
            batch=group.place.batch,
            index=group.place.index,
            images=group.num_images,
        )
        for group in request.groups
    }
    try:
        request.files.log.append(
            "shard",
            name=partial(publish_shard, written, request.files.paths.shards),
            sha256=written.sha256,
            num_bytes=written.num_bytes,
            groups=tuple(refs[gid] for gid in writer.gids),
        )
    except AlreadyDecidedError as error:
        with writer.without(error.gids) as rest:
            return seal(request, rest)
    failpoint("shard-committed")
    return writer.gids
