"""Each check of the gate on real pixels, and jobs that refuse images and make them again."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.dataset_files import OpenDatasets
from synthrep_generator.errors import PermanentPromptError
from synthrep_generator.jobs import Bench, JobResult, JobStoppedError, generate_shard, make_request
from synthrep_generator.quality_gate import (
    Album,
    Candidate,
    Gate,
    Judges,
    is_blank,
    perceptual_hash,
)
from synthrep_generator.synthesis import FakeSynthesizer, ImageTask, Pixels, Recipe, paint
from synthrep_generator.verify import verify_dataset
from synthrep_shared.messages import QualityGate
from synthrep_shared.samples import image_seed

SIDE_PX = 64


def picture(seed: int, side_px: int = SIDE_PX) -> Pixels:
    return paint(ImageTask("a bird", seed), side_px)


def noisy(pixels: Pixels, deviation: float, seed: int = 0) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, deviation, pixels.shape)
    return (pixels + noise).clip(0, 255).round().astype(np.uint8)


def one_colour(red: int, green: int, blue: int) -> Pixels:
    return np.full((SIDE_PX, SIDE_PX, 3), (red, green, blue), np.uint8)


def smooth(seed: int) -> Pixels:
    """A gradient in a random direction, as backgrounds have it."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(*2 * [np.linspace(0, 1, SIDE_PX)])
    ramps = [255 * (a * x + b * y) / (a + b) for a, b in rng.uniform(0.1, 1, (3, 2))]
    return np.stack(ramps, axis=-1).round().astype(np.uint8)


def test_images_of_next_to_one_colour_are_blank() -> None:
    for colour in [(0, 0, 0), (255, 255, 255), (200, 30, 90)]:
        assert is_blank(one_colour(*colour))
        assert is_blank(noisy(one_colour(*colour), 1.5))


def test_images_with_something_on_them_are_not_blank() -> None:
    dot = one_colour(20, 20, 20)
    dot[:12, :12] = 60
    assert not any(map(is_blank, [picture(0), smooth(0), dot]))


def test_copies_hash_alike_and_other_images_do_not() -> None:
    def distance(a: Pixels, b: Pixels) -> int:
        return int(np.bitwise_count(perceptual_hash(a) ^ perceptual_hash(b)))

    stream = io.BytesIO()
    Image.fromarray(picture(0)).save(stream, "JPEG", quality=90)
    assert distance(picture(0), np.asarray(Image.open(stream))) <= 4
    assert distance(picture(0), noisy(picture(0), 3)) <= 4
    others = [distance(picture(a), picture(b)) for a in range(20) for b in range(a)]
    assert min(others) > 4


def test_an_album_knows_images_of_the_batch_only() -> None:
    album = Album(4)
    assert album.add(picture(0), "a")
    assert not album.add(noisy(picture(0), 1), "a")
    assert album.add(picture(1), "a")
    assert album.add(picture(0), "b")
    assert not album.add(picture(1), "a")


class Strict:
    """Judges by what is written on the image: its first pixel."""

    def are_unsafe(self, images: Sequence[Pixels]) -> list[bool]:
        return [bool(image[0, 0, 0] == 1) for image in images]

    def scores(self, images: Sequence[Pixels], captions: Sequence[str]) -> list[float]:
        return [float(image[0, 0, 1]) / 100 - len(caption) for image, caption in
                zip(images, captions, strict=True)]  # fmt: skip


def marked(seed: int, red: int, green: int) -> Pixels:
    pixels = picture(seed).copy()
    pixels[0, 0] = (red, green, 0)
    return pixels


def test_each_check_refuses_what_is_its_own_and_in_order() -> None:
    settings = QualityGate(safety=True, min_clip_score=-0.5)
    gate = Gate(settings, Judges(Strict(), Strict()), capacity=9)
    images = [
        (marked(0, 0, 99), "a"),  # a score of -0.01
        (one_colour(1, 0, 0), "a"),
        (marked(1, 1, 0), "a"),
        (marked(2, 0, 49), "a"),  # a score of -0.51
        (marked(0, 0, 99), "a"),
        (marked(3, 0, 99), "ab"),
    ]
    verdicts = gate.review([Candidate(pixels, text, "b0") for pixels, text in images])
    checks = [verdict and verdict.check for verdict in verdicts]
    assert checks == [None, "blank", "safety", "caption", "duplicate", "caption"]
    assert "-0.510 is below -0.5" in verdicts[3].reason


def test_a_score_that_is_no_number_is_refused() -> None:
    class Broken(Strict):
        def scores(self, images: Sequence[Pixels], captions: Sequence[str]) -> list[float]:
            return [float("nan")] * len(images)

    gate = Gate(QualityGate(min_clip_score=-1.0), Judges(caption=Broken()), capacity=1)
    (verdict,) = gate.review([Candidate(picture(0), "a", "b0")])
    assert verdict is not None


def test_checks_that_are_off_pass_everything() -> None:
    gate = Gate(QualityGate(blank=False, duplicates=False), Judges(), capacity=2)
    assert gate.review([Candidate(one_colour(1, 1, 1), "a", "b0")] * 2) == [None, None]


@pytest.mark.parametrize("settings", [{"safety": True}, {"min_clip_score": 0.2}])
def test_a_judge_that_is_not_there_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="none is loaded"):
        Gate(QualityGate.model_validate(settings), Judges(), capacity=1)


class Watch:
    """Notes the passes; stops at a step if told so."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.begun: list[list[int]] = []
        self._left = stop_at

    def begin(self, places: Sequence[Place]) -> None:
        if places:
            self.begun.append([place.index for place in places])

    def step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise JobStoppedError(discard=False)


PROMPTS = ["a robin", "a wren [fake:dim]", "a crow", "a gull [fake:same]", "an owl"]
IMAGES = 3


@pytest.fixture
def bench(generator_stack: Callable[..., Any]) -> Bench:
    model = generator_stack().settings.models["tiny"]
    return Bench(FakeSynthesizer(store_px=16, batch_images=4), model, "png", 95, Watch())


def run(stack: Any, bench: Bench) -> JobResult:
    chunk = chunk_from_places("birds", [Place("b0", i) for i in range(len(PROMPTS))])
    request = make_request(chunk, OpenDatasets(stack.settings.root)["birds"])
    return JobResult() if request is None else generate_shard(request, bench)


def samples(stack: Any) -> dict[tuple[str, int], tuple[dict[str, Any], Pixels]]:
    """(metadata, pixels) of all that was committed, by caption and image index."""
    found = {}
    for record in stack.records():
        if record.kind != "shard":
            continue
        with tarfile.open(stack.paths.shards / record.name) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        for name in (name for name in files if name.endswith(".json")):
            metadata = json.loads(files[name])
            pixels = np.asarray(Image.open(io.BytesIO(files[name[:-5] + ".png"])))
            key = metadata["caption"], metadata["image_index"]
            assert key not in found
            found[key] = metadata, pixels
    return found


def is_good(header: Any, index: int, k: int, attempt: int) -> bool:
    """Whether the fake makes a good image for its marks: at odd seeds."""
    gid = header.gid(index, PROMPTS[index])
    return image_seed(gid, k, request_seed=None, index=index, attempt=attempt) % 2 == 1


def attempts(header: Any, index: int) -> list[int]:
    """The attempts that end well, by image; one of equal images may stay."""
    found, has_copy = [], False
    for k in range(IMAGES):
        attempt = 0
        while not is_good(header, index, k, attempt):
            if "[fake:same]" in PROMPTS[index] and not has_copy:
                has_copy = True
                break
            attempt += 1
        found.append(attempt)
    return found


def test_refused_images_are_made_again_with_their_next_seeds(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    stack = generator_stack()
    header = stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(max_attempts=16))
    result = run(stack, bench)
    assert (result.committed, result.failed, result.images) == (5, 0, 15)
    found = samples(stack)
    tries = [found[PROMPTS[1], k][0]["attempt"] for k in range(IMAGES)]
    assert tries == attempts(header, 1)
    assert max(tries) > 0
    for (caption, k), (metadata, pixels) in found.items():
        index, attempt = PROMPTS.index(caption), metadata["attempt"]
        if "fake" not in caption:
            assert attempt == 0
        seed = image_seed(metadata["gid"], k, request_seed=None, index=index, attempt=attempt)
        assert metadata["seed"] == seed
        assert not is_blank(pixels)
        if "[fake:same]" not in caption:
            assert np.array_equal(pixels, paint(ImageTask(caption, seed), 16))
    copies = [found[PROMPTS[3], k][1].tobytes() for k in range(IMAGES)]
    assert len(set(copies)) == IMAGES
    assert result.filtered["blank"] == sum(tries)
    assert result.filtered["duplicate"] > 0
    assert verify_dataset(stack.paths, now_s=time.time(), min_age_s=600).is_clean


def test_refused_images_of_all_prompts_share_passes(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    stack = generator_stack()
    stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(max_attempts=16))
    watch = Watch()
    run(stack, replace(bench, watch=watch))
    first, rest = watch.begun[:4], watch.begun[4:]
    assert first == [[0, 1], [1, 2], [2, 3], [4]]
    assert {index for begun in rest for index in begun} <= {1, 3}
    assert rest[0] == [1, 3]


def test_a_prompt_whose_images_stay_poor_fails_and_its_neighbours_do_not(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    class Poor(FakeSynthesizer):
        def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
            dim = [replace(t, seed=2 * t.seed) if "dim" in t.prompt else t for t in tasks]
            return super().generate(dim, recipe, on_step)

    stack = generator_stack()
    stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(duplicates=False, max_attempts=3))
    poor = replace(bench, synthesizer=Poor(store_px=16, batch_images=4))
    result = run(stack, poor)
    assert (result.committed, result.failed) == (4, 1)
    assert result.filtered == {"blank": 3 * IMAGES}
    (record,) = (r for r in stack.records() if r.kind == "failure")
    (failure,) = json.loads((stack.paths.failures / record.name).read_text())
    assert (failure["index"], failure["attempts"]) == (1, 3)
    assert failure["reason"] == "filtered: the image is next to one colour"
    assert sorted(stack.decided()) == [("b0", i) for i in range(5)]
    assert all(metadata["attempt"] == 0 for metadata, _ in samples(stack).values())
    assert run(stack, poor) == JobResult()
    assert verify_dataset(stack.paths, now_s=time.time(), min_age_s=600).is_clean


def test_no_image_is_made_again_for_a_prompt_that_failed_already(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    class Refusing(FakeSynthesizer):
        """Makes no image of the last seed of a dim prompt, and only dim ones of the others."""

        def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
            dim = [replace(t, seed=2 * t.seed) if "dim" in t.prompt else t for t in tasks]
            images = super().generate(dim, recipe, on_step)
            for place, task in enumerate(tasks):
                if task.seed == last_seed:
                    images[place] = PermanentPromptError("no such image")
            return images

    stack = generator_stack()
    header = stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(duplicates=False))
    last_seed = image_seed(header.gid(1, PROMPTS[1]), IMAGES - 1, request_seed=None, index=1)
    watch = Watch()
    made = Refusing(store_px=16, batch_images=4)
    result = run(stack, replace(bench, synthesizer=made, watch=watch))
    assert (result.committed, result.failed) == (4, 1)
    assert len(watch.begun) == 4


def test_a_job_that_was_stopped_ends_with_the_same_images(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    found = []
    for stop_at in (None, 6, 17):
        stack = generator_stack()
        stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(max_attempts=16))
        if stop_at is not None:
            run(stack, replace(bench, watch=Watch(stop_at)))
            assert len(stack.decided()) < 5
        run(stack, bench)
        assert sorted(stack.decided()) == [("b0", i) for i in range(5)]
        found.append({
            key: (metadata["seed"], metadata["attempt"], pixels.tobytes())
            for key, (metadata, pixels) in samples(stack).items()
        })  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 15


def test_a_stop_seals_the_groups_that_are_whole_beside_one_that_waits(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    stack = generator_stack()
    stack.accept(PROMPTS, images=IMAGES, quality_gate=QualityGate(max_attempts=16))
    run(stack, replace(bench, watch=Watch(stop_at=16)))  # in the first pass of images made again
    assert stack.decided() == [("b0", 0), ("b0", 2), ("b0", 4)]


def test_without_a_gate_only_one_colour_fails_a_prompt(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    stack = generator_stack()
    stack.accept([*PROMPTS[:4], "a coot [fake:blank]"], images=IMAGES)
    result = run(stack, bench)
    assert result == JobResult(committed=4, failed=1, images=12)
