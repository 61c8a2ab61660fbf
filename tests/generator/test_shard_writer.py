"""Shards: the tar that tarfile and webdataset read, the same bytes every time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from synthrep_generator.shard_writer import (
    ShardWriter,
    WrittenShard,
    encode_image,
    publish_shard,
    tar_member,
)
from synthrep_shared.errors import StorageError

GROUPS = {
    f"{i:032x}": [(f"{i:032x}-{k}.jpg", bytes([i, k]) * (500 + 7 * k)) for k in range(2)]
    for i in range(3)
}
# Several times what one write takes.
LARGE = {
    "a": [("a-0.jpg", bytes(range(256)) * 12_000), ("a-1.jpg", b"1" * ((1 << 20) - 512))],
    "b": [("b-0.jpg", b"2" * 700_001)],
    "c": [("c-0.jpg", b"3" * 1_500_000), ("c-0.json", b"{}")],
}


def joined(groups: dict[str, list[tuple[str, bytes]]]) -> bytes:
    members = [member for group in groups.values() for member in group]
    return b"".join(part for member in members for part in tar_member(*member)) + bytes(1024)


def write(folder: Path, groups: dict[str, list[tuple[str, bytes]]]) -> tuple[WrittenShard, bytes]:
    with ShardWriter(folder) as writer:
        for gid, members in groups.items():
            writer.add_group(gid, members)
        written = writer.finish()
        return written, written.path.read_bytes()


contents = st.binary(max_size=1100)


@given(st.lists(contents, min_size=1, max_size=5))
def test_tarfile_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, files: list[bytes]
) -> None:
    members = [(f"{i:032x}-0.json", content) for i, content in enumerate(files)]
    _, data = write(tmp_path_factory.mktemp("tar"), {"g": members})
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert found == members


@pytest.mark.parametrize("name", ["0" * 32 + "-11.jpg", "~" * 99, "a"])
def test_a_header_is_the_one_that_tarfile_writes(name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = 1234, 0o644, 0
    header, content, padding = tar_member(info.name, bytes(1234))
    assert header == info.tobuf(tarfile.USTAR_FORMAT)
    assert (len(content), padding) == (1234, bytes(3 * 512 - 1234))


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ustar"):
        tar_member("x" * 100, b"")


def test_equal_groups_give_equal_bytes_and_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    first, data = write(tmp_path, GROUPS)
    second, again = write(tmp_path, GROUPS)
    assert data == again
    assert first.sha256 == second.sha256 == hashlib.sha256(data).hexdigest()
    assert first.num_bytes == len(data)


def test_without_leaves_out_the_named_groups_and_keeps_order(tmp_path: Path) -> None:
    gids = list(GROUPS)
    rest = {gid: GROUPS[gid] for gid in (gids[0], gids[2])}
    with ShardWriter(tmp_path) as writer:
        for gid, members in GROUPS.items():
            writer.add_group(gid, members)
        with writer.without({gids[1]}) as fewer:
            assert fewer.gids == list(rest)
            assert fewer.finish().path.read_bytes() == write(tmp_path, rest)[1]


def test_a_shard_of_many_pieces_is_whole(tmp_path: Path) -> None:
    written, data = write(tmp_path, LARGE)
    assert data == joined(LARGE)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    with ShardWriter(tmp_path) as writer:
        for gid, members in LARGE.items():
            writer.add_group(gid, members)
        with writer.without({"b"}) as fewer:
            rest = {gid: LARGE[gid] for gid in ("a", "c")}
            assert fewer.finish().path.read_bytes() == joined(rest)


@pytest.mark.parametrize("most", [700, 4096, 300_000])
def test_a_short_write_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_all(fd, data[:most]))
    written, data = write(tmp_path, LARGE)
    assert data == joined(LARGE)
    assert written.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("call", ["fcntl", "write"])
def test_a_file_system_without_writes_past_the_cache_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_all, control = os.write, fcntl.fcntl

    def refuse_at_write(fd: int, data: memoryview) -> int:
        if control(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return write_all(fd, data)

    def refuse_at_once(fd: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return control(fd, command, flags)

    if call == "write":
        monkeypatch.setattr(os, "write", refuse_at_write)
    else:
        monkeypatch.setattr(fcntl, "fcntl", refuse_at_once)
    assert write(tmp_path, LARGE)[1] == joined(LARGE)


@pytest.mark.parametrize("groups", [GROUPS, LARGE])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EINVAL])
def test_what_the_disk_refuses_is_raised(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: dict[str, list[tuple[str, bytes]]],
    code: int,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, "refused")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path, groups)
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path) as writer:  # noqa: PT012
        writer.add_group("g", GROUPS["0" * 32])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_the_disk_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "refused")

    open_before = os.listdir("/dev/fd")
    with ShardWriter(tmp_path) as writer:
        for gid, members in LARGE.items():
            writer.add_group(gid, members)
        writer.finish()
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(OSError, match="refused"):
            writer.without({"b"})
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    assert os.listdir("/dev/fd") == open_before


def test_a_shard_whose_file_does_not_close_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def refuse(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EDQUOT, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refuse)
        with pytest.raises(OSError, match="refused"):
            write(tmp_path, GROUPS)
    assert list(tmp_path.iterdir()) == []


def test_publishing_names_the_shard_by_sequence_and_content(tmp_path: Path) -> None:
    written, data = write_kept(tmp_path)
    name = publish_shard(written, tmp_path, 7)
    assert name == f"00000007-{hashlib.sha256(data).hexdigest()[:12]}.tar"
    assert (tmp_path / name).read_bytes() == data
    assert not written.path.exists()


def test_an_orphan_of_the_same_content_is_adopted(tmp_path: Path) -> None:
    first, _ = write_kept(tmp_path)
    second, data = write_kept(tmp_path)
    name = publish_shard(first, tmp_path, 7)
    assert publish_shard(second, tmp_path, 7) == name
    assert (tmp_path / name).read_bytes() == data


def test_a_damaged_orphan_is_not_adopted(tmp_path: Path) -> None:
    first, data = write_kept(tmp_path)
    second, _ = write_kept(tmp_path)
    name = publish_shard(first, tmp_path, 7)
    (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(StorageError):
        publish_shard(second, tmp_path, 7)


def write_kept(folder: Path) -> tuple[WrittenShard, bytes]:
    """A written shard that outlives its writer, as one does whose process dies."""
    written, data = write(folder, GROUPS)
    written.path.write_bytes(data)
    return written, data


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_images_decode_to_what_was_encoded(image_format: str) -> None:
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=2)
    data = encode_image(pixels, image_format=image_format, quality=95)
    assert data == encode_image(pixels, image_format=image_format, quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    assert np.abs(decoded - pixels).mean() < (1e-9 if image_format == "png" else 4)
