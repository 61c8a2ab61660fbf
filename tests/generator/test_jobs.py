"""One job: whole groups, each caption with its own images, nothing twice."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.dataset_files import OpenDatasets
from synthrep_generator.errors import IntakeError
from synthrep_generator.jobs import (
    Bench,
    JobResult,
    JobStoppedError,
    generate_shard,
    make_request,
)
from synthrep_generator.synthesis import FakeSynthesizer, ImageTask, Pixels, Recipe, paint
from synthrep_generator.verify import verify_dataset
from synthrep_shared.commit_log import CommitRecord
from synthrep_shared.errors import StorageError
from synthrep_shared.messages import MixtureComponent
from synthrep_shared.samples import caption_id, image_seed, parse_member_name
from synthrep_shared.storage import sha256_file

PROMPTS = ["a robin", "a wren", "a robin", "a crow", "a gull"]
STORE_PX = 16
RECIPE: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 3, "scheduler": "ddim"}


class Watch:
    """Notes what is begun; stops at a step if told so."""

    def __init__(self, stop_at: int | None = None, *, discard: bool = False) -> None:
        self.begun: list[list[Place]] = []
        self._left, self._discard = stop_at, discard

    def begin(self, places: Sequence[Place]) -> None:
        self.begun.append(list(places))

    def step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise JobStoppedError(discard=self._discard)


@pytest.fixture
def stack(generator_stack: Callable[..., Any]) -> Any:
    return generator_stack()


@pytest.fixture
def bench(stack: Any) -> Bench:
    model = stack.settings.models["tiny"]
    synthesizer = FakeSynthesizer(store_px=STORE_PX, batch_images=4)
    return Bench(synthesizer, model, "png", 95, Watch())


def chunk(count: int = len(PROMPTS), batch: str = "b0", dataset: str = "birds") -> Chunk:
    return chunk_from_places(dataset, [Place(batch, i) for i in range(count)])


def run(stack: Any, bench: Bench, wanted: Chunk) -> JobResult:
    request = make_request(wanted, OpenDatasets(stack.settings.root)[wanted.dataset])
    return JobResult() if request is None else generate_shard(request, bench)


def read_shard(stack: Any, record: CommitRecord) -> list[tuple[str, int, dict[str, Any], Any]]:
    """(gid, image index, metadata, pixels) of each sample, from adjacent member pairs."""
    file = stack.paths.shards / record.name
    assert sha256_file(file) == record.sha256
    assert file.stat().st_size == record.bytes
    with tarfile.open(file) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    samples = []
    for (image_name, image), (text_name, text) in zip(members[::2], members[1::2], strict=True):
        gid, k, suffix = parse_member_name(image_name)
        assert parse_member_name(text_name) == (gid, k, "json")
        assert suffix != "json"
        samples.append((gid, k, json.loads(text), np.asarray(Image.open(io.BytesIO(image)))))
    return samples


def check_shard(stack: Any, record: CommitRecord, header: Any, prompts: list[str]) -> None:
    """Every group of the record is whole, in order, and made of its own caption and seeds."""
    per_prompt = header.settings.images_per_prompt
    samples = read_shard(stack, record)
    assert [sample[:2] for sample in samples] == [
        (group.gid, k) for group in record.groups for k in range(per_prompt)
    ]
    for place, group in enumerate(record.groups):
        caption = prompts[group.index]
        assert group.gid == header.gid(group.index, caption)
        assert group.images == per_prompt
        assert group.caption_id == caption_id(caption)
        for gid, k, metadata, pixels in samples[place * per_prompt : (place + 1) * per_prompt]:
            seed = image_seed(gid, k, request_seed=header.settings.seed, index=group.index)
            assert metadata["caption"] == caption
            assert metadata["gid"] == gid
            assert metadata["image_index"] == k
            assert metadata["seed"] == seed
            assert metadata["stored_px"] == STORE_PX
            assert np.array_equal(pixels, paint(ImageTask(caption, seed), STORE_PX))


@pytest.mark.parametrize("images", [1, 3, 4, 7])
@pytest.mark.parametrize("seed", [None, 5])
def test_every_caption_gets_its_own_whole_group(
    stack: Any, bench: Bench, images: int, seed: int | None
) -> None:
    header = stack.accept(PROMPTS, images=images, seed=seed)
    result = run(stack, bench, chunk())
    assert result == JobResult(committed=5, failed=0, images=5 * images)
    (record,) = stack.records()
    assert [(group.batch, group.index) for group in record.groups] == [("b0", i) for i in range(5)]
    check_shard(stack, record, header, PROMPTS)
    assert list(stack.paths.temporary.iterdir()) == []


class Swapping(FakeSynthesizer):
    def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
        images = super().generate(tasks, recipe, on_step)
        return [images[1], images[0], *images[2:]]


class Unseeded(FakeSynthesizer):
    def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
        return super().generate([replace(task, seed=0) for task in tasks], recipe, on_step)


class Short(FakeSynthesizer):
    def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
        return super().generate(tasks, recipe, on_step)[:-1]


@pytest.mark.parametrize("wrong", [Swapping, Unseeded])
def test_the_check_of_a_shard_sees_images_of_another_caption_or_seed(
    stack: Any, bench: Bench, wrong: type[FakeSynthesizer]
) -> None:
    header = stack.accept(PROMPTS)
    run(stack, replace(bench, synthesizer=wrong(store_px=STORE_PX)), chunk())
    with pytest.raises(AssertionError):
        check_shard(stack, stack.records()[0], header, PROMPTS)


def test_a_synthesizer_that_loses_an_image_commits_nothing(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS)
    with pytest.raises(ValueError, match="zip"):
        run(stack, replace(bench, synthesizer=Short(store_px=STORE_PX)), chunk())
    assert stack.records() == []
    assert list(stack.paths.temporary.iterdir()) == []


def test_device_batches_hold_images_of_several_prompts(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS, images=3)
    run(stack, bench, chunk(3))
    first, second, third, over = bench.watch.begun  # type: ignore[attr-defined]
    assert [[place.index for place in begun] for begun in (first, second, third)] == [
        [0, 1],
        [1, 2],
        [2],
    ]
    assert over == []


class Shrinking(FakeSynthesizer):
    """Finds at its second pass that the device takes half as many."""

    def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
        images = super().generate(tasks, recipe, on_step)
        self.passes = [*getattr(self, "passes", []), len(tasks)]
        if len(self.passes) == 2:
            self.batch_images = 2
        return images


def test_samples_tell_how_many_images_shared_the_device(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS, images=3)
    synthesizer = Shrinking(store_px=STORE_PX, batch_images=5)
    run(stack, replace(bench, synthesizer=synthesizer), chunk())
    assert synthesizer.passes == [5, 5, 2, 2, 1]
    told = [metadata["batch_images"] for _, _, metadata, _ in read_shard(stack, stack.records()[0])]
    assert told == [5] * 5 + [2, 2, 2, 2, 1] + [2, 2, 2, 2, 1]


def test_refused_prompts_are_not_counted_in_a_pass(stack: Any, bench: Bench) -> None:
    stack.accept(["a robin", "x [fake:refuse]", "a wren", "a crow"], images=1)
    run(stack, bench, chunk(4))
    told = [metadata["batch_images"] for _, _, metadata, _ in read_shard(stack, stack.records()[0])]
    assert told == [3, 3, 3]


def test_what_is_decided_is_not_made_again(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS)
    run(stack, bench, chunk(2))
    assert run(stack, bench, chunk()).committed == 3
    assert run(stack, bench, chunk()) == JobResult()
    assert stack.decided() == [("b0", i) for i in range(5)]
    check_shard(stack, stack.records()[1], header, PROMPTS)


def test_a_group_decided_during_the_work_is_left_out_of_the_shard(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS)
    late = make_request(chunk(), OpenDatasets(stack.settings.root)["birds"])
    run(stack, bench, chunk(2))
    assert late is not None
    assert generate_shard(late, bench).committed == 3
    assert stack.decided() == [("b0", i) for i in range(5)]
    check_shard(stack, stack.records()[1], header, PROMPTS)
    assert generate_shard(late, bench) == JobResult()
    assert list(stack.paths.temporary.iterdir()) == []


def test_a_batch_cancelled_during_the_work_gets_no_shard(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS)
    files = OpenDatasets(stack.settings.root)["birds"]
    request = make_request(chunk(), files)
    files.log.append("cancel", name=lambda _: "b0")
    assert request is not None
    assert generate_shard(request, bench) == JobResult()
    assert [record.kind for record in stack.records()] == ["cancel"]


def test_a_prompt_without_images_fails_and_its_neighbours_do_not(stack: Any, bench: Bench) -> None:
    prompts = ["a robin", "x [fake:refuse]", "a wren", "x [fake:blank]"]
    header = stack.accept(prompts)
    assert run(stack, bench, chunk(4)) == JobResult(committed=2, failed=2, images=4)
    shard, failure = stack.records()
    check_shard(stack, shard, header, prompts)
    details = json.loads((stack.paths.failures / failure.name).read_text())
    assert [(d["index"], d["prompt"], d["attempts"]) for d in details] == [
        (1, prompts[1], 1),
        (3, prompts[3], 1),
    ]
    assert "blank" in details[1]["reason"]


def test_a_stopped_job_seals_whole_groups_only(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS, images=3)
    # Passes of four images: six of the fifteen images are made in full passes before the stop.
    stopped = replace(bench, watch=Watch(stop_at=9))
    assert run(stack, stopped, chunk()).committed == 2
    assert stack.decided() == [("b0", 0), ("b0", 1)]
    check_shard(stack, stack.records()[0], header, PROMPTS)


class Late(FakeSynthesizer):
    """Its images are ready only once the next pass was given, or is known not to come."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.events: list[str] = []

    def start(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> Any:
        number = sum(event.startswith("given") for event in self.events)
        self.events.append(f"given {number}")
        events, made = self.events, self.generate(tasks, recipe, on_step)

        class Pending:
            is_ready = False
            shared_by = [len(tasks)] * len(tasks)

            def results(self) -> list[Any]:
                events.append(f"taken {number}")
                return made

        return Pending()


def test_a_pass_is_taken_while_the_device_has_the_next(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS)
    late = Late(store_px=STORE_PX, batch_images=4)
    assert run(stack, replace(bench, synthesizer=late), chunk()).committed == 5
    check_shard(stack, stack.records()[0], header, PROMPTS)
    assert late.events == ["given 0", "given 1", "taken 0", "given 2", "taken 1", "taken 2"]


def test_a_pass_that_was_made_before_the_stop_is_sealed(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS, images=3)
    late = Late(store_px=STORE_PX, batch_images=4)
    stopped = replace(bench, synthesizer=late, watch=Watch(stop_at=9))
    assert run(stack, stopped, chunk()).committed == 2
    check_shard(stack, stack.records()[0], header, PROMPTS)


def test_a_pass_that_is_on_the_device_at_the_stop_is_sealed(stack: Any, bench: Bench) -> None:
    class StopsBetweenPasses(Watch):
        def begin(self, places: Sequence[Place]) -> None:
            super().begin(places)
            if len(self.begun) == 2:
                raise JobStoppedError(discard=False)

    stack.accept(PROMPTS, images=2)
    late = Late(store_px=STORE_PX, batch_images=4)
    stopped = replace(bench, synthesizer=late, watch=StopsBetweenPasses())
    assert run(stack, stopped, chunk()).committed == 2
    assert late.events == ["given 0", "taken 0"]


def test_a_discarded_job_commits_nothing(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS)
    assert run(stack, replace(bench, watch=Watch(9, discard=True)), chunk()) == JobResult()
    assert stack.records() == []


def test_a_full_disk_is_no_prompt_s_fault(
    stack: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    stack.accept(PROMPTS)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", refuse)
        with pytest.raises(OSError, match="no space"):
            run(stack, bench, chunk())
    assert stack.records() == []
    assert list(stack.paths.temporary.iterdir()) == []
    assert run(stack, bench, chunk()).committed == 5


def test_two_runs_from_nothing_give_equal_shards(
    generator_stack: Callable[..., Any], bench: Bench
) -> None:
    digests = []
    for _ in range(2):
        stack = generator_stack()
        stack.accept(PROMPTS)
        run(stack, replace(bench, image_format="jpg"), chunk())
        digests.append([record.sha256 for record in stack.records()])
    assert digests[0] == digests[1] != []


def test_a_shard_of_a_writer_that_died_before_its_log_line_is_adopted(
    stack: Any, bench: Bench
) -> None:
    header = stack.accept(PROMPTS)
    run(stack, bench, chunk())
    (record,) = stack.records()
    stack.paths.log.unlink()
    assert run(stack, bench, chunk()).committed == 5
    assert [r.name for r in stack.records()] == [record.name]
    check_shard(stack, stack.records()[0], header, PROMPTS)


def test_batches_of_different_settings_are_not_mixed(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS, batch="b0", images=2)
    stack.accept(PROMPTS, batch="b1", images=3)
    mixed = chunk_from_places("birds", [Place("b0", 0), Place("b1", 0)])
    with pytest.raises(IntakeError):
        run(stack, bench, mixed)


MIXTURE = (
    MixtureComponent(model="tiny", weight=2, **RECIPE | {"guidance_scale": 1.5}),
    MixtureComponent(model="other", weight=1, **RECIPE),
)


def test_a_mixture_s_prompts_are_made_as_their_components_say(stack: Any, bench: Bench) -> None:
    header = stack.accept(PROMPTS, mixture=MIXTURE)
    for component, wanted in enumerate([("tiny", 1.5), ("other", 2.0)]):
        places = [Place("b0", i) for i in header.deal.indices(component, 0, 9)]
        assert run(stack, bench, chunk_from_places("birds", places)).committed == len(places)
        record = stack.records()[-1]
        check_shard(stack, record, header, PROMPTS)
        for _, _, metadata, _ in read_shard(stack, record):
            assert (metadata["model"], metadata["guidance_scale"]) == wanted
    assert sorted(stack.decided()) == [("b0", i) for i in range(5)]
    report = verify_dataset(stack.paths, now_s=time.time(), min_age_s=600)
    assert report.is_clean
    assert report.committed == 5


def test_components_are_not_mixed_in_a_job(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS, mixture=MIXTURE)
    with pytest.raises(IntakeError, match="different settings"):
        run(stack, bench, chunk())


def test_a_chunk_may_hold_prompts_of_several_batches(stack: Any, bench: Bench) -> None:
    for batch in ("b0", "b1"):
        stack.accept(PROMPTS, batch=batch)
    both = chunk_from_places("birds", [Place("b0", 4), Place("b1", 1), Place("b1", 2)])
    assert run(stack, bench, both).committed == 3
    assert stack.decided() == [("b0", 4), ("b1", 1), ("b1", 2)]


def test_a_data_set_that_was_never_accepted_is_not_made(stack: Any, bench: Bench) -> None:
    with pytest.raises(StorageError):
        run(stack, bench, chunk(dataset="bees"))
    assert not (stack.settings.root / "bees").exists()


# webdataset 1.0.2 leaves the file of an exhausted stream to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_opens_a_shard(stack: Any, bench: Bench) -> None:
    stack.accept(PROMPTS, images=2)
    run(stack, replace(bench, image_format="jpg"), chunk())
    url = str(stack.paths.shards / stack.records()[0].name)
    samples = list(
        webdataset.WebDataset(url, shardshuffle=False).decode("pil").to_tuple("jpg", "json")
    )
    assert [sample[1]["caption"] for sample in samples] == [p for p in PROMPTS for _ in range(2)]
    image: Pixels = np.asarray(samples[0][0])
    assert image.shape == (STORE_PX, STORE_PX, 3)


def test_only_the_diffusers_synthesizer_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys, synthrep_generator.jobs, synthrep_generator.worker,"
        " synthrep_generator.reconciler, synthrep_generator.device_process;"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
