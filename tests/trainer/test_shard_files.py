"""A shard that is not what the log says is found before one of its images is used."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from synthrep_trainer.shard_files import (
    GroupKey,
    ShardMismatchError,
    read_caption,
    read_images,
    verify_shard,
)


def verify(maker, record):
    keys = [GroupKey(g.gid, g.caption_id, g.images) for g in record.groups]
    path = maker.paths.shards / record.name
    return verify_shard(path, sha256=record.sha256, num_bytes=record.bytes, groups=keys)


def members(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def without(number):
    return lambda files: files[:number] + files[number + 1 :]


def renamed(number, name):
    return lambda files: [(name, d) if k == number else (n, d) for k, (n, d) in enumerate(files)]


def swapped_json(files):
    """The JSON of the first two groups changes places."""
    by_group = [k for k, (name, _) in enumerate(files) if name.endswith("-0.json")]
    first, second = by_group[:2]
    files = list(files)
    files[first], files[second] = (
        (files[first][0], files[second][1]),
        (files[second][0], files[first][1]),
    )
    return files


def other_caption(files):
    return [(n, d.replace(b"bird", b"fish") if n.endswith("json") else d) for n, d in files]


def test_captions_are_read_by_offset(shard_maker):
    captions = ["a wren", "ein Zaunkönig", "a very " + "small " * 90 + "bird"]
    record = shard_maker.commit(3, captions=captions)
    layout, path = verify(shard_maker, record), shard_maker.paths.shards / record.name
    assert [read_caption(path, layout, place) for place in (2, 0, 1)] == [
        captions[place] for place in (2, 0, 1)
    ]


def test_images_are_read_by_offset(shard_maker):
    record = shard_maker.commit(3, images=4)
    layout = verify(shard_maker, record)
    path = shard_maker.paths.shards / record.name
    stored = dict(members(path.read_bytes()))
    for place, group in enumerate(record.groups):
        images = read_images(path, layout, place, [2, 0, 3])
        assert [i.data for i in images] == [stored[f"{group.gid}-{k}.jpg"] for k in (2, 0, 3)]
        assert {i.suffix for i in images} == {"jpg"}


@pytest.mark.parametrize("case", range(50))
def test_damage_after_the_commit_is_detected(shard_maker, case):
    dice = random.Random(case)

    def damage(data: bytes) -> bytes:
        at = dice.choice([dice.randrange(len(data)), 512 * dice.randrange(len(data) // 512)])
        kind = dice.choice(["cut", "flip", "lengthen"])
        if kind == "cut":
            return data[:at]
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
        return data + bytes(512)

    record = shard_maker.commit(2, break_file=damage)
    with pytest.raises(ShardMismatchError):
        verify(shard_maker, record)


def test_a_missing_file_is_detected(shard_maker):
    record = shard_maker.commit(1)
    (shard_maker.paths.shards / record.name).unlink()
    with pytest.raises(ShardMismatchError, match="missing"):
        verify(shard_maker, record)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(0), "has not 3 images"),
        (without(1), "has not 3 images"),
        (without(4), "has not 3 images"),
        (renamed(0, "bird.jpg"), "no valid member"),
        (renamed(0, "../x.jpg"), "no valid member"),
        (renamed(0, f"{'0' * 32}-0.jpg"), "not in the log"),
        (swapped_json, "describes another image"),
        (other_caption, "has another caption"),
        (lambda files: [(n, b"{}" if n.endswith("json") else d) for n, d in files], "malformed"),
        (lambda files: [*files, (files[1][0].replace("-0.", "-9."), files[1][1])], "another image"),
        (lambda files: [*files, files[0]], "has not 3 images"),
    ],
)
def test_a_shard_that_was_written_wrong_is_detected(shard_maker, make_tar, change, reason):
    record = shard_maker.commit(2, break_tar=lambda data: make_tar(change(members(data))))
    with pytest.raises(ShardMismatchError, match=reason):
        verify(shard_maker, record)


def test_a_log_with_other_images_or_captions_is_detected(shard_maker):
    fewer = shard_maker.commit(
        2, break_groups=lambda groups: [g.model_copy(update={"images": 2}) for g in groups]
    )
    other = shard_maker.commit(
        1, break_groups=lambda groups: [groups[0].model_copy(update={"caption_id": "0" * 15})]
    )
    for record, reason in ((fewer, "has not 2 images"), (other, "another caption")):
        with pytest.raises(ShardMismatchError, match=reason):
            verify(shard_maker, record)


@pytest.mark.parametrize("size", [b"-0000001000", b"-0000000001", b"77777777777"])
def test_a_member_ends_within_the_shard_and_after_its_begin(shard_maker, size):
    def resized(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = size + b"\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]

    record = shard_maker.commit(1, break_tar=resized)
    with pytest.raises(ShardMismatchError, match="no file within the shard"):
        verify(shard_maker, record)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_only_plain_files_are_members(shard_maker, kind):
    def link(data: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            info = tar.next()
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0
        return info.tobuf(tarfile.USTAR_FORMAT) + data

    record = shard_maker.commit(1, break_tar=link)
    with pytest.raises(ShardMismatchError, match=r"no file within the shard|no valid member"):
        verify(shard_maker, record)
