"""The map of a run's features: `map.json` of its folder, as it is written and read.

It shows a bounded sample of the run's images as one checkpoint sees them: their places on two axes,
and for each its nearest images of other captions. `map_drawing` makes it. Needs no torch.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

from synthrep_shared.storage import publish_bytes

_log = logging.getLogger(__name__)
VERSION = 1
_NAME = "map.json"
_STALE_S = 86_400.0  # a file written aside for longer belongs to a process that died
_MAX_BYTES = 32 << 20  # more than 2,000 images of captions as long as may be


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MappedGroup(_Record):
    """A caption with images on the map."""

    gid: str
    caption: str
    is_held_out: bool
    """Whether the run is never trained on it."""


class MappedImage(_Record):
    """One image: position `image` of `groups[group]`."""

    group: int
    image: int
    x: float
    y: float
    nearest: tuple[tuple[int, float], ...]
    """Images of other captions, as indices into `images`, with their cosines, nearest first."""


class Neighbour(NamedTuple):
    """An image near those of a group."""

    group: MappedGroup
    image: int
    cosine: float


class FeatureMap(_Record):
    """One map; features are unit vectors, `x` and `y` their first two principal components."""

    version: int = VERSION
    dataset: str
    step: int
    checkpoint: str
    """sha256 of the checkpoint's manifest."""
    shares: tuple[float, float]
    """What each axis holds of the variance."""
    neighbour_accuracy: float | None
    """How often an image's nearest is one of its own caption; None for fewer than two captions."""
    groups: tuple[MappedGroup, ...]
    images: tuple[MappedImage, ...]

    @model_validator(mode="after")
    def _holds_what_it_points_to(self) -> Self:
        groups, images = range(len(self.groups)), range(len(self.images))
        for image in self.images:
            if image.group not in groups or any(near not in images for near, _ in image.nearest):
                raise ValueError("a map points to what it does not hold")
        if not self.images:
            raise ValueError("a map holds images")
        return self

    def neighbours(self, gid: str, count: int) -> list[Neighbour]:
        """The images of other captions that are nearest to any image of a group; [] off the map."""
        cosines: dict[int, float] = {}
        for image in self.images:
            if self.groups[image.group].gid == gid:
                for near, cosine in image.nearest:
                    cosines[near] = max(cosine, cosines.get(near, -1.0))
        nearest = sorted(cosines, key=lambda near: (-cosines[near], near))[:count]
        found = [(self.images[near], cosines[near]) for near in nearest]
        return [Neighbour(self.groups[near.group], near.image, c) for near, c in found]


def write_feature_map(run_folder: Path, feature_map: FeatureMap) -> None:
    """Replace the run's map, whole. What a killed process left half written a day ago goes."""
    data = feature_map.model_dump_json().encode()
    publish_bytes(data, run_folder / _NAME, replace=True)
    oldest_s = time.time() - _STALE_S
    for aside in run_folder.glob(f".{_NAME}.*.part"):
        with suppress(FileNotFoundError):  # another probe of the run is done with it, too
            if aside.stat().st_mtime < oldest_s:
                aside.unlink()


def read_feature_map(run_folder: Path) -> FeatureMap | None:
    """The run's map, None if there is none that this version can read."""
    path = run_folder / _NAME
    try:
        status = path.stat()
        return _parsed(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=16)
def _parsed(path: Path, num_bytes: int, *_identity: int) -> FeatureMap | None:
    """Parsed once for each file that lay there: pages ask every second."""
    try:
        if num_bytes > _MAX_BYTES:
            raise ValueError("a map is not so large")
        found = FeatureMap.model_validate_json(path.read_bytes())
    except ValueError:
        _log.warning("feature_map_unreadable", extra={"path": str(path)})
        return None
    return found if found.version == VERSION else None
