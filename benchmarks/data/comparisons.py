"""Microseconds of one core an image, from a shard on disk to a batch."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data.paths import path_s, read_s, write_shard
from benchmarks.harness import (
    PEER_PYTHON,
    Dose,
    Measured,
    PeerAbsentError,
    case,
    in_process,
    interleave,
)

_UNIT = "us/image"
_TORCHVISION = "webdataset, PIL and torchvision v1"
_DALI = "nvidia-dali-cuda120, jitter by a matrix"
_SPDL = "spdl with FFmpeg 5.1"
_ALBUMENTATIONS = "webdataset, simplejpeg and albumentationsx"


def _compare(dose: Dose, measure: Callable[..., float], ours: str, peer: str) -> Measured:
    groups = dose.size(60, 24)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.tar"
        write_shard(shard, groups)
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        shard.with_suffix(".sha256").write_text(digest)
        given: dict[str, Any] = {"shard": str(shard), "groups": groups}
        return interleave(
            lambda: 1e6 * in_process(measure, name=ours, **given),
            lambda: 1e6 * in_process(measure, python=PEER_PYTHON, name=peer, **given),
            rounds=dose.rounds(5),
        )


@case("float views", unit=_UNIT, peer=_TORCHVISION, higher_is_better=False, min_ratio=2.7)
def float_views(dose: Dose) -> Measured:
    return _compare(dose, path_s, "float", "torchvision")


@case("float views, OpenCV", unit=_UNIT, peer=_ALBUMENTATIONS, higher_is_better=False,
      min_ratio=1.6)  # fmt: skip
def float_views_of_albumentations(dose: Dose) -> Measured:
    return _compare(dose, path_s, "float", "albumentationsx")


@case("uint8 views", unit=_UNIT, peer=_TORCHVISION, higher_is_better=False, min_ratio=6.0)
def uint8_views(dose: Dose) -> Measured:
    """Less work than the peer's: ours leaves normalising to the device."""
    found = _compare(dose, path_s, "uint8", "torchvision")
    return Measured(found.ours, found.peer, found.rounds, "less work: the peer also normalises")


@case("float views, DALI on a CPU", unit=_UNIT, peer=_DALI, higher_is_better=False)
def float_views_of_dali(dose: Dose) -> Measured:
    """Its jitter is one matrix and its blur another; it decodes only what it crops."""
    return _compare(dose, path_s, "float", "dali")


@case("uint8 crops", unit=_UNIT, peer=_SPDL, higher_is_better=False)
def crops(dose: Dose) -> Measured:
    """Decode, random resized crop and flip: what both can do."""
    return _compare(dose, path_s, "crops", "spdl")


@case("float views, FFCV", unit=_UNIT, peer="FFCV", higher_is_better=False)
def float_views_of_ffcv(dose: Dose) -> Measured:
    """Not measured."""
    raise PeerAbsentError(
        "a source distribution alone, which wants a compiler, OpenCV by pkg-config and libturbojpeg"
    )


@case("groups from tar", unit=_UNIT, peer="webdataset", higher_is_better=False, min_ratio=6.0)
def groups(dose: Dose) -> Measured:
    """Of a shard that was verified before, as every use but the first finds it."""
    return _compare(dose, read_s, "verified", "webdataset")


@case("groups from tar, first use", unit=_UNIT, peer="webdataset", higher_is_better=False)
def groups_of_first_use(dose: Dose) -> Measured:
    """With sha256, every header and every JSON checked, which the peer does not do."""
    return _compare(dose, read_s, "first use", "webdataset")
