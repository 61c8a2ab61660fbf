"""The order of training as arithmetic: which group comes when, and which of its images.

Keys are hashes of (seed, window, group), not draws from a generator: a group's key does not depend
on which other groups there are, so leaving one out never changes the order of the rest, and no
library's generator can change the order of a run.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Integers = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_GROUPS, _IMAGES, _CAPTIONS = 1, 2, 3  # what a key is for; keeps the kinds apart


class SamplingPlan(BaseModel):
    """What fixes the order besides the log."""

    model_config = ConfigDict(frozen=True)

    seed: int
    captions_per_batch: int
    images_per_caption: int
    min_fill_groups: int
    max_uses_per_image: int
    held_out: float = 0.0
    """Share of captions that are never drawn."""
    max_age_groups: int | None = None
    """Only so many of the newest groups are drawn; held out and rejected ones do not count."""
    min_generated_per_trained: float = 0.0
    """Committed images for each drawn image view, below which no batch is cut."""
    views_per_batch: int = 1


def window_order(seed: int, window: int, groups: Integers) -> Integers:
    """The groups (positions in the log) in the order in which window `window` uses them."""
    return groups[np.argsort(_keys([seed, _GROUPS, window], groups), kind="stable")]


def draw_images(seed: int, group: int, use: int, *, num_images: int, num_drawn: int) -> list[int]:
    """Which images of a group its use number `use` (from 0) takes; all different where they can be.

    Uses walk round the images in a shuffled order, so that none is drawn a second time before each
    was drawn once; the order is shuffled anew whenever a walk ends exactly at the last image. A
    group with fewer images than are drawn gives each of them several times.
    """
    period = num_images // gcd(num_images, num_drawn)
    keys = _keys([seed, _IMAGES, group, use // period], np.arange(num_images))
    shuffled = np.argsort(keys, kind="stable")
    first = (use % period) * num_drawn
    return [int(shuffled[(first + i) % num_images]) for i in range(num_drawn)]


def is_held_out(caption_ids: Integers, share: float) -> NDArray[np.bool_]:
    """Whether captions belong to the share that is never trained on; a function of the id alone."""
    return _keys([_CAPTIONS], caption_ids) / 2.0**64 < share


def uses_allowed(plan: SamplingPlan, num_images: Integers) -> Integers:
    """How often groups of so many images may be used before an image was drawn too often."""
    return num_images * plan.max_uses_per_image // plan.images_per_caption


def _keys(prefix: list[int], items: Integers) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for part in prefix:
        state = _mixed(state ^ np.array([part], dtype=np.uint64))
    return _mixed(state ^ items.astype(np.uint64))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014); arithmetic modulo 2^64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
