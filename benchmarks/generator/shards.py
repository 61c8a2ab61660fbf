"""Writing shards: 100 groups of ten JPEG files of 256 px, flushed to disk."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.harness import (
    PEER_PYTHON,
    Dose,
    Measured,
    case,
    cpu_s,
    in_process,
    interleave,
    wall_s,
)
from synthrep_generator.shard_writer import Member, ShardWriter, publish_shard
from synthrep_shared.storage import sha256_file, sync_folder

_GROUPS = 100
_IMAGES = 10
_SIDE_PX = 256
_REPEATS = 5
Clock = Callable[[Callable[[], object]], float]


@case(
    "shard writing with fsync, processor time",
    unit="MB/s of a core",
    peer="webdataset.ShardWriter and fsync",
    min_ratio=5.0,
)
def shard_cpu(dose: Dose) -> Measured:
    """Ours also hashes the content and gives the file its final name; the peer does not."""
    return interleave(
        partial(mb_per_s_ours, "cpu"),
        lambda: in_process(mb_per_s_webdataset, python=PEER_PYTHON, clock="cpu"),
        rounds=dose.rounds(5),
    )


@case(
    "shard writing with fsync and sha256, processor time",
    unit="MB/s of a core",
    peer="webdataset.ShardWriter, fsync and sha256",
)
def shard_cpu_hashed(dose: Dose) -> Measured:
    """The same work on both sides but for the name: a reader needs the digest."""
    return interleave(
        partial(mb_per_s_ours, "cpu"),
        lambda: in_process(mb_per_s_webdataset, python=PEER_PYTHON, clock="cpu", is_hashed=True),
        rounds=dose.rounds(5),
    )


@case("shard writing with fsync, wall", unit="MB/s", peer="one write and fsync of the same bytes")
def shard_wall(dose: Dose) -> Measured:
    """Against the floor: no headers, no hash, no name."""
    return interleave(
        partial(mb_per_s_ours, "wall"), partial(mb_per_s_raw, "wall"), rounds=dose.rounds(7)
    )


def mb_per_s_ours(clock: str) -> float:
    """Our writer, from members in memory to a published shard."""
    groups = _groups()

    def write() -> None:
        with tempfile.TemporaryDirectory(dir=_disk()) as folder:
            for seq in range(1, _REPEATS + 1):
                with ShardWriter(Path(folder)) as writer:
                    for gid, members in groups:
                        writer.add_group(gid, members)
                    publish_shard(writer.finish(), Path(folder), seq)

    return _megabytes(groups) * _REPEATS / _clock(clock)(write)


def mb_per_s_webdataset(clock: str, is_hashed: bool = False) -> float:
    """The usual writer, one sample an image, with an fsync of what it closed."""
    from webdataset import ShardWriter as PeerWriter

    samples = [
        {"__key__": members[i][0][:-4], "jpg": members[i][1], "json": members[i + 1][1]}
        for _, members in _groups()
        for i in range(0, len(members), 2)
    ]

    def write() -> None:
        with tempfile.TemporaryDirectory(dir=_disk()) as folder:
            for number in range(_REPEATS):
                with PeerWriter(f"{folder}/{number}-%d.tar", verbose=0) as writer:
                    for sample in samples:
                        writer.write(sample)
                path = Path(folder) / f"{number}-0.tar"
                _sync(path)
                if is_hashed:
                    sha256_file(path)

    return _megabytes(_groups()) * _REPEATS / _clock(clock)(write)


def mb_per_s_raw(clock: str) -> float:
    """The members' bytes as one block."""
    data = b"".join(content for _, members in _groups() for _, content in members)

    def write() -> None:
        with tempfile.TemporaryDirectory(dir=_disk()) as folder:
            for number in range(_REPEATS):
                path = Path(folder) / f"{number}.bin"
                path.write_bytes(data)
                _sync(path)

    return len(data) * _REPEATS / 1e6 / _clock(clock)(write)


@cache
def _groups() -> list[tuple[str, list[Member]]]:
    """Blurred noise, whose JPEG files have about the size of a photo's."""
    generator = np.random.Generator(np.random.PCG64(0))
    groups = []
    for number in range(_GROUPS):
        gid, members = f"{number:032x}", list[Member]()
        for k in range(_IMAGES):
            stream = io.BytesIO()
            noise = generator.integers(0, 256, (_SIDE_PX, _SIDE_PX, 3), np.uint8)
            image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))
            image.save(stream, "JPEG", quality=95)
            note = json.dumps({"caption": f"group {number}", "gid": gid, "image_index": k})
            members += [(f"{gid}-{k}.jpg", stream.getvalue()), (f"{gid}-{k}.json", note.encode())]
        groups.append((gid, members))
    return groups


def _megabytes(groups: list[tuple[str, list[Member]]]) -> float:
    return sum(len(content) for _, members in groups for _, content in members) / 1e6


def _clock(name: str) -> Clock:
    return cpu_s if name == "cpu" else wall_s


def _disk() -> Path:
    """A folder on the disk of the project, not in memory."""
    folder = Path(__file__).parents[2] / "runs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
