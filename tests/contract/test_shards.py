"""Shards are written by the generator's own job here, and read by the trainer and by webdataset."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from synthrep_generator.intake import IntakeReader
from synthrep_generator.shard_writer import ShardWriter, encode_image, publish_shard
from synthrep_generator.synthesis import ImageTask, paint
from synthrep_shared.commit_log import CommitRecord, read_log
from synthrep_shared.samples import SampleMetadata, caption_id, image_seed, parse_member_name
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.shard_files import GroupKey, read_images, verify_shard
from synthrep_trainer.shard_stream import ShardStream

# Among them: a caption twice in a batch, one that another batch has too, one that needs NFC.
BATCHES = {
    "b0": ["a robin", "a wren", "a robin", "a crow in the snow"],
    "b1": ["a wren", "a cafe\u0301 owl", "a gull, close-up"],
}
SEEDS = {"b0": None, "b1": 11}
IMAGES = {"b0": 3, "b1": 2}


@pytest.fixture
def records(factory) -> list[CommitRecord]:
    """Two shards, of batches that differ in seed and images per prompt."""
    for batch, prompts in BATCHES.items():
        factory.accept(prompts, batch=batch, images=IMAGES[batch], seed=SEEDS[batch])
        assert factory.generate(batch).committed == len(prompts)
    return list(read_log(factory.paths.log))


def web_samples(factory, record: CommitRecord) -> list[tuple[Image.Image, dict[str, Any]]]:
    """(image, metadata) of a shard, as somebody without this project reads it."""
    url = str(factory.paths.shards / record.name)
    with warnings.catch_warnings():
        # webdataset 1.0.2 leaves the file of an exhausted stream to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.freeze()  # only what is made from here on needs collecting
        dataset = webdataset.WebDataset(url, shardshuffle=False)
        samples = list(dataset.decode("pil").to_tuple("jpg", "json"))
        del dataset
        gc.collect()
        gc.unfreeze()
    return samples


def expected_samples(factory, record: CommitRecord) -> list[tuple[bytes, SampleMetadata]]:
    """(JPEG, metadata) of a shard, in order, from the intake file and the log alone."""
    expected = []
    for group in record.groups:
        reader = IntakeReader(factory.paths, group.batch)
        (prompt,) = reader.prompts(group.index, 1)
        settings = reader.header.settings
        assert group.gid == reader.header.gid(group.index, prompt)
        for k in range(settings.images_per_prompt):
            seed = image_seed(group.gid, k, request_seed=settings.seed, index=group.index)
            pixels = paint(ImageTask(prompt, seed), factory.store_px)
            metadata = SampleMetadata(
                caption=prompt, caption_id=group.caption_id, gid=group.gid, image_index=k,
                seed=seed, model="tiny", model_revision="fake", scheduler="dpm++",
                num_inference_steps=7, guidance_scale=2.5, negative_prompt="blurry",
                stored_px=factory.store_px, generator_version="0.1.0", dtype="fake",
                batch_images=sum(g.images for g in record.groups), image_quality=95,
            )  # fmt: skip
            expected.append((encode_image(pixels, image_format="jpg", quality=95), metadata))
    return expected


def trainer_images(factory, record: CommitRecord) -> list[bytes]:
    """All images of a shard, group by group, as the trainer's files give them."""
    path = factory.paths.shards / record.name
    keys = [GroupKey(g.gid, g.caption_id, g.images) for g in record.groups]
    layout = verify_shard(path, sha256=record.sha256, num_bytes=record.bytes, groups=keys)
    return [
        image.data
        for place, group in enumerate(record.groups)
        for image in read_images(path, layout, place, range(group.images))
    ]


def plan(**changes: int) -> SamplingPlan:
    values = {
        "seed": 7, "captions_per_batch": 4, "images_per_caption": 2, "min_fill_groups": 4,
        "max_uses_per_image": 100,
    }  # fmt: skip
    return SamplingPlan(**(values | changes))


def test_the_log_has_every_prompt_with_its_caption_and_images(factory, records):
    groups = [group for record in records for group in record.groups]
    assert [(g.batch, g.index, g.images, g.caption_id) for g in groups] == [
        (batch, index, IMAGES[batch], caption_id(prompt))
        for batch, prompts in BATCHES.items()
        for index, prompt in enumerate(prompts)
    ]
    assert len({group.gid for group in groups}) == len(groups)


def test_plain_webdataset_reads_what_was_asked_for(factory, records):
    for record in records:
        expected = expected_samples(factory, record)
        found = web_samples(factory, record)
        assert [SampleMetadata(**metadata) for _, metadata in found] == [m for _, m in expected]
        for (image, _), (jpeg, _) in zip(found, expected, strict=True):
            assert np.array_equal(image, Image.open(io.BytesIO(jpeg)))


def test_images_of_a_group_are_adjacent_and_in_order_to_webdataset(factory, records):
    for record in records:
        metadata = [metadata for _, metadata in web_samples(factory, record)]
        runs = [(gid, [m["image_index"] for m in run])
                for gid, run in groupby(metadata, key=lambda m: m["gid"])]  # fmt: skip
        assert runs == [(g.gid, list(range(g.images))) for g in record.groups]


def test_the_trainer_reads_the_bytes_that_were_written(factory, records):
    for record in records:
        expected = [jpeg for jpeg, _ in expected_samples(factory, record)]
        assert trainer_images(factory, record) == expected


def test_the_trainers_stream_draws_every_group_with_its_caption_and_its_own_images(
    factory, records, tmp_path
):
    refs = [group for record in records for group in record.groups]
    # One batch of all groups that draws all images of the larger ones.
    everything = plan(captions_per_batch=len(refs), min_fill_groups=len(refs), images_per_caption=3)
    stream = ShardStream(factory.paths, tmp_path / "run", everything)
    drawn = stream.next_batch(lambda: True)
    assert sorted(group.group for group in drawn.groups) == list(range(len(refs)))
    jpegs = {
        (metadata.gid, metadata.image_index): jpeg
        for record in records
        for jpeg, metadata in expected_samples(factory, record)
    }
    for group in drawn.groups:
        ref = refs[group.group]
        assert group.caption_id == int(ref.caption_id, 16)
        assert set(group.images) == set(range(ref.images))
        stream.verify(group.shard)
        found = stream.store.read(group.shard, group.place, group.images)
        assert [image.data for image in found] == [jpegs[ref.gid, k] for k in group.images]


def test_equal_captions_are_positives_across_batches(factory, records, tmp_path):
    num_groups = sum(map(len, BATCHES.values()))
    whole = plan(captions_per_batch=num_groups, min_fill_groups=num_groups)
    batch = ShardStream(factory.paths, tmp_path / "run", whole).next_batch(lambda: True)
    prompts = [prompt for batch_prompts in BATCHES.values() for prompt in batch_prompts]
    by_group = {group.group: group.caption_id for group in batch.groups}
    for i, first in enumerate(prompts):
        for j, second in enumerate(prompts):
            assert (by_group[i] == by_group[j]) == (first == second)


# What follows commits a second shard that is wrong, and shows that no image of it is ever drawn.

Members = list[tuple[str, bytes]]


def rewrite(change: Callable[[Members], Members]) -> Callable[[Any, CommitRecord], CommitRecord]:
    """A generator that writes other members: the shard's digest in the log fits its bytes."""

    def apply(factory, record: CommitRecord) -> CommitRecord:
        path = factory.paths.shards / record.name
        with tarfile.open(path) as tar:
            members = change([(info.name, tar.extractfile(info).read()) for info in tar])
        path.unlink()
        with ShardWriter(factory.paths.temporary) as writer:
            writer.add_group("all", members)
            written = writer.finish()
            name = publish_shard(written, factory.paths.shards, record.seq)
        changes = {"name": name, "sha256": written.sha256, "bytes": written.num_bytes}
        return record.model_copy(update=changes)

    return apply


def damage(change: Callable[[bytes], bytes]) -> Callable[[Any, CommitRecord], CommitRecord]:
    """A disk that holds other bytes than were committed."""

    def apply(factory, record: CommitRecord) -> CommitRecord:
        path = factory.paths.shards / record.name
        path.write_bytes(change(path.read_bytes()))
        return record

    return apply


def swap_captions(members: Members) -> Members:
    """The first two groups tell each other's caption, consistently within each of them."""
    texts = {name: json.loads(data) for name, data in members if name.endswith(".json")}
    gids = list(dict.fromkeys(text["gid"] for text in texts.values()))[:2]
    told = {text["gid"]: (text["caption"], text["caption_id"]) for text in texts.values()}
    other = dict(zip(gids, reversed(gids), strict=True))
    for text in texts.values():
        text["caption"], text["caption_id"] = told[other.get(text["gid"], text["gid"])]
    return [(n, json.dumps(texts[n]).encode() if n in texts else data) for n, data in members]


def misspell_caption(members: Members) -> Members:
    """One image's JSON tells a caption that its caption id does not stand for."""
    (name, data), *_ = [member for member in members if member[0].endswith(".json")]
    misspelt = data.replace(b"a robin", b"a robot")
    assert misspelt != data
    return [(n, misspelt if n == name else d) for n, d in members]


def drop_image(members: Members) -> Members:
    """The second image of the first group, and its JSON."""
    gid, _, _ = parse_member_name(members[0][0])
    return [member for member in members if parse_member_name(member[0])[:2] != (gid, 1)]


def drop_description(members: Members) -> Members:
    """The JSON of the first image alone."""
    return members[:1] + members[2:]


def drop_group(members: Members) -> Members:
    """All of the first group."""
    return [member for member in members if member[0][:32] != members[0][0][:32]]


WRONG = {
    "two captions swapped": (rewrite(swap_captions), "has another caption"),
    "a misspelt caption": (rewrite(misspell_caption), "has another caption"),
    "an image missing": (rewrite(drop_image), "has not 3 images"),
    "a description missing": (rewrite(drop_description), "has not 3 images"),
    "a group missing": (rewrite(drop_group), "has not 3 images"),
    "a caption corrupted on disk": (
        damage(lambda data: data.replace(b'"a wren"', b'"a hen!"')),
        "sha256",
    ),
    "half written": (damage(lambda data: data[: len(data) // 2]), "bytes, the log says"),
    "half written, zeros after it": (
        damage(lambda data: data[: len(data) // 2].ljust(len(data), b"\0")),
        "sha256",
    ),
    "never written": (damage(lambda data: b""), "bytes, the log says"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_trainer_finds_a_wrong_shard_before_it_uses_an_image(factory, tmp_path, case):
    make_wrong, reason = WRONG[case]
    for batch in ("b0", "b1", "b2"):
        factory.accept(BATCHES["b0"], batch=batch)
        factory.generate(batch)
    good, wrong, _ = list(read_log(factory.paths.log))
    wrong = make_wrong(factory, wrong)
    lines = factory.paths.log.read_bytes().splitlines(keepends=True)
    lines[1] = wrong.model_dump_json().encode() + b"\n"
    factory.paths.log.write_bytes(b"".join(lines))

    stream = ShardStream(factory.paths, tmp_path / "run", plan(), verify_s=60)
    drawn = [group for _ in range(20) for group in stream.next_batch(lambda: True).groups]
    assert {group.shard.seq for group in drawn} == {good.seq, good.seq + 2}
    notes = list((tmp_path / "run" / "quarantine").iterdir())
    assert [note.name for note in notes] == [f"{wrong.seq}.json"]
    note = json.loads(notes[0].read_text())
    assert note["name"] == wrong.name
    assert reason in note["reason"]


def test_a_shard_that_no_line_of_the_log_names_does_not_exist(factory, records, tmp_path):
    """What a writer leaves that is killed between publishing and committing."""
    path = factory.paths.shards / records[0].name
    (factory.paths.shards / f"{3:08d}-{records[0].sha256[:12]}.tar").write_bytes(path.read_bytes())
    line = records[0].model_copy(update={"seq": 3}).model_dump_json().encode()
    with factory.paths.log.open("ab") as log:
        log.write(line)  # torn: without its end
    num_groups = sum(map(len, BATCHES.values()))
    stream = ShardStream(factory.paths, tmp_path / "run", plan())
    batches = [stream.next_batch(lambda: True) for _ in range(20)]
    drawn = {group.group for batch in batches for group in batch.groups}
    assert drawn == set(range(num_groups))
    assert stream.images_committed == sum(len(v) * IMAGES[k] for k, v in BATCHES.items())
