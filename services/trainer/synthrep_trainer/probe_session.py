"""The order in which a probe may read a labelled set: fitting parts, then its choices, then test.

The test part opens only after the choices made on validation were recorded, and they can be
recorded once: no score on test can steer them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from synthrep_trainer.probe_archive import ImageBatch
from synthrep_trainer.probe_data import ProbeDataset
from synthrep_trainer.probe_splits import class_names, open_split

VALIDATION_SHARE = 0.2

Choices = Mapping[str, float]
"""What validation chose, by the name of the features."""


class TestIsSealedError(RuntimeError):
    """The test part was asked for before a choice was recorded, or a second choice came."""

    __test__ = False  # no test case, whatever pytest makes of the name


@dataclass
class ProbeSession:
    """One probe's reading of a set: train and val first, then the choices, then test."""

    dataset: ProbeDataset
    _choices: Choices | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Raises ProbeDataError now, not after the fit, if train or test is missing."""
        for split in ("train", "test"):
            self.dataset.require(split)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by class index, None where the set does not tell them."""
        return class_names(self.dataset)

    @property
    def fitting_splits(self) -> tuple[Literal["train", "val"], ...]:
        """`train`, and `val` where the set has one; else `validation_mask` cuts train."""
        return ("train", "val") if "val" in self.dataset.splits else ("train",)

    def fitting_batches(
        self, split: Literal["train", "val"], *, image_px: int
    ) -> Iterator[ImageBatch]:
        """The images of a fitting part; raises ProbeDataError where the archive is at fault."""
        if split not in ("train", "val"):
            raise TestIsSealedError(f"{split!r} is not for fitting; see test_batches")
        return open_split(self.dataset, split, image_px=image_px)

    def record(self, choices: Choices, *, store: Callable[[Choices], None] | None = None) -> None:
        """Fix what validation has chosen; `store` makes it durable first, and may refuse."""
        if self._choices is not None:
            raise TestIsSealedError(f"choices were recorded before: {self._choices}")
        if not choices:
            raise ValueError("choices must name at least one value")
        if store is not None:
            store(choices)
        self._choices = dict(choices)

    def test_batches(self, *, image_px: int) -> Iterator[ImageBatch]:
        """The test images; raises TestIsSealedError unless choices have been recorded."""
        if self._choices is None:
            raise TestIsSealedError(f"{self.dataset.name}: record the choices before opening test")
        return open_split(self.dataset, "test", image_px=image_px)


def validation_mask(labels: Int64[np.ndarray, " n"], *, seed: int) -> Bool[np.ndarray, " n"]:
    """True for the rows of train that validate: 20 % of each class, drawn with `seed`.

    A class keeps at least one row on each side, if it has two. The rows depend on the labels and
    the seed alone.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(VALIDATION_SHARE * len(rows))) if len(rows) > 1 else 0
        mask[rng.permutation(rows)[:count]] = True
    return mask
