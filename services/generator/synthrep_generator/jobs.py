"""One job, from captions to a sealed shard: `generate_shard(request)`.

What a request asks for and is decided already is left out, before the work and again under the
log's lock, so a job may run any number of times, anywhere, at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.dataset_files import DatasetFiles
from synthrep_generator.errors import IntakeError, PermanentPromptError
from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_generator.settings import ModelConfig
from synthrep_generator.shard_writer import Member, ShardWriter, encode_image, publish_shard
from synthrep_generator.synthesis import (
    ImageTask,
    Pixels,
    Recipe,
    Synthesizer,
    recipe_from_settings,
)
from synthrep_shared.commit_log import GroupRef
from synthrep_shared.errors import AlreadyDecidedError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.samples import SampleMetadata, caption_id, image_seed, member_name

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
class Group:
    """One prompt to make images of."""

    place: Place
    gid: str
    prompt: str
    seeds: tuple[int, ...]


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


class JobResult(BaseModel):
    """What a job decided, in prompts, and the images it committed."""

    model_config = ConfigDict(frozen=True)

    committed: int = 0
    failed: int = 0
    images: int = 0


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
            gid = header.gid(index, prompt)
            seeds = tuple(
                image_seed(gid, k, request_seed=settings.seed, index=index)
                for k in range(settings.images_per_prompt)
            )
            groups.append(Group(Place(part.batch, index), gid, prompt, seeds))
    return ShardRequest(files, settings, tuple(groups)) if settings and groups else None


def generate_shard(request: ShardRequest, bench: Bench) -> JobResult:
    """Make the images, seal one shard, commit it and the prompts that cannot succeed.

    Raises OSError or SynthRepError where the place is to blame and the job may succeed later, and
    whatever the synthesizer raises. Stopped by the watch, it commits the groups that are complete.
    """
    recipe = recipe_from_settings(request.settings)
    folder = request.files.paths.temporary
    with ShardWriter(folder) as writer, ThreadPoolExecutor(_ENCODERS) as pool:
        shelf = _Shelf(request, bench, recipe, writer, pool)
        try:
            for tasks in _device_batches(request.groups, bench.synthesizer.batch_images):
                bench.watch.begin(_places(tasks))
                images = [ImageTask(group.prompt, group.seeds[k]) for group, k in tasks]
                shelf.add(tasks, bench.synthesizer.generate(images, recipe, bench.watch.step))
        except JobStoppedError as stop:
            if stop.discard:
                return JobResult()
        shelf.finish()
        bench.watch.begin(())
        sealed = _seal(request, writer)
    failed = record_failures(request.files.paths, request.files.log, shelf.failures)
    images_made = len(sealed) * request.settings.images_per_prompt
    return JobResult(committed=len(sealed), failed=failed, images=images_made)


def _device_batches(
    groups: Sequence[Group], device_batch_images: int
) -> Iterator[list[tuple[Group, int]]]:
    """The (group, image index) pairs in canonical order, as many at a time as fill the device."""
    pairs = [(group, k) for group in groups for k in range(len(group.seeds))]
    for start in range(0, len(pairs), device_batch_images):
        yield pairs[start : start + device_batch_images]


def _places(tasks: Sequence[tuple[Group, int]]) -> list[Place]:
    return list(dict.fromkeys(group.place for group, _ in tasks))


class _Shelf:
    """Takes images as they come, encodes them beside the device's work, and writes whole groups."""

    def __init__(
        self,
        request: ShardRequest,
        bench: Bench,
        recipe: Recipe,
        writer: ShardWriter,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._bench, self._writer, self._pool = bench, writer, pool
        self._describe = partial(_metadata, settings=request.settings, recipe=recipe, bench=bench)
        self._open: dict[Group, list[Future[list[Member]]]] = {}
        self.failures: list[Failure] = []

    def add(
        self,
        tasks: Sequence[tuple[Group, int]],
        results: Sequence[Pixels | PermanentPromptError],
    ) -> None:
        for (group, k), result in zip(tasks, results, strict=True):
            future = self._pool.submit(self._members, group, k, result)
            self._open.setdefault(group, []).append(future)
        self._write(lambda futures: all(future.done() for future in futures))

    def finish(self) -> None:
        """Write every group whose images all came; what is not complete is left out."""
        self._write(lambda _: True)

    def _write(self, is_ready: Callable[[list[Future[list[Member]]]], bool]) -> None:
        for group, futures in list(self._open.items()):
            if len(futures) < len(group.seeds) or not is_ready(futures):
                return
            del self._open[group]
            try:
                members = [member for future in futures for member in future.result()]
            except PermanentPromptError as error:
                self.failures.append(
                    Failure(
                        gid=group.gid,
                        batch=group.place.batch,
                        index=group.place.index,
                        prompt=group.prompt,
                        reason=str(error),
                        attempts=1,
                    )
                )
            else:
                self._writer.add_group(group.gid, members)

    def _members(
        self, group: Group, image_index: int, result: Pixels | PermanentPromptError
    ) -> list[Member]:
        if isinstance(result, PermanentPromptError):
            raise result
        if result.min() == result.max():
            raise PermanentPromptError("blank image: every pixel has the same value")
        suffix = self._bench.image_format
        image = encode_image(result, image_format=suffix, quality=self._bench.quality)
        return [
            (member_name(group.gid, image_index, suffix), image),
            (member_name(group.gid, image_index, "json"), self._describe(group, image_index)),
        ]


def _metadata(
    group: Group, image_index: int, *, settings: GenerationSettings, recipe: Recipe, bench: Bench
) -> bytes:
    metadata = SampleMetadata(
        caption=group.prompt,
        caption_id=caption_id(group.prompt),
        gid=group.gid,
        image_index=image_index,
        seed=group.seeds[image_index],
        model=settings.model,
        model_revision=bench.synthesizer.revision,
        scheduler=recipe.scheduler,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        negative_prompt=recipe.negative_prompt,
        stored_px=bench.model.store_px,
        generator_version=_generator_version(),
        dtype=bench.synthesizer.dtype,
        loras=tuple(f"{lora.path.name}@{lora.scale:g}" for lora in bench.model.loras),
        caption_truncated=bench.synthesizer.caption_fit(group.prompt).is_truncated,
    )
    return json.dumps(metadata.model_dump(), sort_keys=True).encode()


@cache
def _generator_version() -> str:
    return version("synthrep-generator")


def _seal(request: ShardRequest, writer: ShardWriter) -> list[str]:
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
            images=len(group.seeds),
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
            return _seal(request, rest)
    failpoint("shard-committed")
    return writer.gids
