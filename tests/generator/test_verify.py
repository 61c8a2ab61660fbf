"""A whole data set is found sound; each way of being damaged is found, and named."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthrep_generator.verify import DatasetReport, verify_dataset
from synthrep_shared.commit_log import read_log
from synthrep_shared.errors import StorageError
from synthrep_shared.samples import image_seed
from synthrep_shared.storage import DatasetPaths

NOW_S = 2_000_000_000.0
PROMPTS = ["a dog", "a cat", "a hen", "an owl"]


def check(paths: DatasetPaths, **options: Any) -> DatasetReport:
    return verify_dataset(paths, now_s=NOW_S, min_age_s=3600, **options)


@pytest.fixture
def done(pets: Any) -> Any:
    """Two prompts committed in one shard, one failed, one undecided."""
    header = pets.accept(PROMPTS)
    pets.commit(header, {0: PROMPTS[0], 1: PROMPTS[1]})
    pets.fail(header, {2: PROMPTS[2]})
    return pets


def shard(pets: Any) -> Path:
    return next(pets.paths.shards.iterdir())


def rewrite_record(pets: Any, seq: int, change: Callable[[dict[str, Any]], None]) -> None:
    records = [json.loads(line) for line in pets.paths.log.read_text().splitlines()]
    change(records[seq - 1])
    pets.paths.log.write_text("".join(json.dumps(record) + "\n" for record in records))


def rewrite_shard(pets: Any, old: bytes, new: bytes) -> None:
    """Other bytes in the shard, and a record that vouches for them."""
    data = shard(pets).read_bytes()
    assert old in data
    data = data.replace(old, new)
    shard(pets).write_bytes(data)

    def vouch(record: dict[str, Any]) -> None:
        record.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    rewrite_record(pets, 1, vouch)


def test_a_whole_data_set_is_clean_and_counted(done: Any) -> None:
    report = check(done.paths)
    assert report.is_clean
    counts = (report.accepted, report.committed, report.failed, report.cancelled, report.undecided)
    assert counts == (4, 2, 1, 0, 1)
    assert (report.records, report.shards, report.images) == (2, 1, 4)
    assert report.bytes == shard(done).stat().st_size


def test_cancelled_prompts_are_not_undecided(done: Any) -> None:
    done.log.append("cancel", name=lambda _: "b" * 32)
    report = check(done.paths)
    assert (report.cancelled, report.undecided, report.is_clean) == (1, 0, True)


def test_a_data_set_that_was_never_made_is_an_error(root: Path) -> None:
    with pytest.raises(StorageError, match="no data set 'fish'"):
        check(DatasetPaths(root, "fish"))


def drop_shard(pets: Any) -> None:
    shard(pets).unlink()


def drop_failures(pets: Any) -> None:
    next(pets.paths.failures.iterdir()).unlink()


def flip_a_bit(pets: Any) -> None:
    data = bytearray(shard(pets).read_bytes())
    data[700] ^= 1
    shard(pets).write_bytes(data)


def cut_the_shard(pets: Any) -> None:
    os.truncate(shard(pets), 1024)


def swap_captions(pets: Any) -> None:
    data = shard(pets).read_bytes()
    rewrite_shard(pets, data, data.replace(b"a dog", b"a fig"))


def change_the_guidance(pets: Any) -> None:
    rewrite_shard(pets, b'"guidance_scale": 2.0', b'"guidance_scale": 3.0')


def use_a_later_seed(pets: Any) -> None:
    rewrite_shard(pets, b'"attempt": 0', b'"attempt": 1')


def go_on_without_a_gate(pets: Any) -> None:
    """A second attempt with its own seed, in a batch that allows one."""
    data = shard(pets).read_bytes()
    gid = next(read_log(pets.paths.log)).groups[0].gid
    for k in range(2):
        first, second = (
            f'"seed": {image_seed(gid, k, request_seed=None, index=0, attempt=attempt)},'.encode()
            for attempt in (0, 1)
        )
        if len(first) == len(second):
            break
    before, _, after = data.partition(first)
    after = after.replace(b'"attempt": 0', b'"attempt": 1', 1)
    rewrite_shard(pets, data, before + second + after)


def swap_members(pets: Any) -> None:
    data = shard(pets).read_bytes()
    name = next(read_log(pets.paths.log)).groups[0].gid.encode()
    rewrite_shard(pets, data, data.replace(name + b"-0.jpg", name + b"-0.png"))  # bad checksum


def drop_a_sample(pets: Any) -> None:
    data = shard(pets).read_bytes()
    with tarfile.open(shard(pets)) as tar:
        end = tar.getmembers()[2].offset
    rewrite_shard(pets, data, data[:end] + bytes(1024))


def claim_other_images(pets: Any) -> None:
    rewrite_record(pets, 1, lambda record: record["groups"][0].update(images=1))


def claim_other_prompt(pets: Any) -> None:
    rewrite_record(pets, 1, lambda record: record["groups"][0].update(index=99))


def make_a_hole(pets: Any) -> None:
    rewrite_record(pets, 2, lambda record: record.update(seq=3))


def lose_the_log(pets: Any) -> None:
    pets.paths.log.unlink()


def lose_an_intake_line(pets: Any) -> None:
    file = next(pets.paths.intake.iterdir())
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def tear_a_shard(pets: Any) -> None:
    (pets.paths.shards / f"00000003-{'a' * 12}.tar").write_bytes(b"half")


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (drop_shard, "missing"),
        (drop_failures, "missing"),
        (flip_a_bit, "corrupt"),
        (cut_the_shard, "corrupt"),
        (swap_captions, "wrong"),
        (change_the_guidance, "wrong"),
        (use_a_later_seed, "wrong"),
        (go_on_without_a_gate, "wrong"),
        (swap_members, "wrong"),
        (drop_a_sample, "wrong"),
        (claim_other_images, "log"),
        (claim_other_prompt, "log"),
        (make_a_hole, "log"),
        (lose_the_log, "log"),
        (lose_an_intake_line, "intake"),
        (tear_a_shard, "torn"),
    ],
)
def test_damage_is_found(done: Any, break_it: Callable[[Any], None], kind: str) -> None:
    break_it(done)
    report = check(done.paths)
    assert {damage.kind for damage in report.damage} == {kind}
    assert not report.is_sound


def test_an_outcome_too_many_is_counted(done: Any) -> None:
    records = [json.loads(line) for line in done.paths.log.read_text().splitlines()]
    again = records[0] | {"seq": 3}
    with done.paths.log.open("a") as log:
        log.write(json.dumps(again) + "\n")
    report = check(done.paths)
    assert (report.duplicated, report.committed, report.is_sound) == (2, 2, False)


def test_leftovers_are_named_and_no_damage(done: Any) -> None:
    digest = hashlib.sha256(b"whole").hexdigest()[:12]
    orphan = done.paths.shards / f"00000003-{digest}.tar"
    orphan.write_bytes(b"whole")
    old, young = (done.paths.temporary / f".shard.tar.{i}.00.part" for i in range(2))
    for file, age_s in ((old, 7200), (young, 60)):
        file.touch()
        os.utime(file, (NOW_S - age_s, NOW_S - age_s))
    with done.paths.log.open("a") as log:
        log.write('{"version":1,"se')
    report = check(done.paths)
    assert report.leftovers == [f"shards/{orphan.name}", f"tmp/{old.name}"]
    assert report.torn_bytes == 16
    assert (report.is_sound, report.is_clean) == (True, False)


def test_a_shard_on_its_way_to_its_record_is_not_left_over(done: Any) -> None:
    young, passed = (done.paths.shards / f"0000000{seq}-{'a' * 12}.tar" for seq in (3, 1))
    for file in (young, passed):
        file.touch()
        os.utime(file, (NOW_S - 1, NOW_S - 1))
    assert check(done.paths).leftovers == [f"shards/{passed.name}"]
    os.utime(young, (NOW_S - 7200, NOW_S - 7200))
    assert len(check(done.paths).leftovers) == 2


def test_a_line_that_is_being_written_is_not_torn(done: Any) -> None:
    with done.paths.log.open("a") as log:
        log.write('{"version":1,"se')
    for age_s, torn_bytes in ((1, 0), (7200, 16)):
        os.utime(done.paths.log, (NOW_S - age_s, NOW_S - age_s))
        assert check(done.paths).torn_bytes == torn_bytes


def test_the_judge_sees_every_image_and_its_description(done: Any) -> None:
    seen = []
    report = check(done.paths, judge=lambda data, image: seen.append((data.caption, image)))
    assert [caption for caption, _ in seen] == ["a dog", "a dog", "a cat", "a cat"]
    assert all(image.startswith(b"jpeg of ") for _, image in seen)
    assert report.is_clean
    report = check(done.paths, judge=lambda *_: "too dark")
    assert len(report.damage) == 4
    assert "too dark" in report.damage[0].detail
