"""The labelled sets that probes may name, and the order in which a probe may read them.

    probe_datasets(root) -> ProbeDataset -> open() -> ProbeSession: fitting parts -> choice -> test

The sets in `probe_sets/` travel with the package. Those in `<root>/probe/NAME/` are added under
their names and win over built-in ones. A session opens the test part only after the choice made on
validation was recorded, and the choice can be recorded once: no score on test can steer it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from synthrep_trainer.probe_archive import ImageBatch, ProbeDataError, read_batches

__all__ = [
    "Choices",
    "Metric",
    "ProbeDataError",
    "ProbeDataset",
    "ProbeSession",
    "TestIsSealedError",
    "probe_datasets",
    "validation_mask",
]

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "mean_per_class"]
Split = Literal["train", "val", "test"]

BUILT_IN = Path(__file__).parent / "probe_sets"
VALIDATION_SHARE = 0.2
_SUFFIXES = (".tar", ".tar.gz", ".tar.xz")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# Of the paper's eleven sets, those whose score is the mean over classes, as they are often spelled
# (without case and punctuation).
_MEAN_PER_CLASS = frozenset(
    {"aircraft", "fgvcaircraft", "caltech101", "flowers", "flowers102", "oxfordflowers102"}
    | {"pets", "oxfordpets", "oxfordiiitpets", "oxfordiiitpet"}
)
_VOC = frozenset({"voc2007", "pascalvoc2007"})

Choices = Mapping[str, float]
"""What validation chose, by the name of the features."""


class TestIsSealedError(RuntimeError):
    """The test part was asked for before a choice was recorded, or a second choice came."""

    __test__ = False  # no test case, whatever pytest makes of the name


@dataclass(frozen=True)
class ProbeDataset:
    """One labelled set: `<folder>/{train,test}.tar[.gz|.xz]`, optional `val` and classes.txt.

    Nothing is opened before it is used; a damaged set fails where it is read.
    """

    name: str
    folder: Path

    @property
    def metric(self) -> Metric:
        """Accuracy, unless the name is one of the eleven that take the mean over classes."""
        plain = re.sub(r"[^a-z0-9]", "", self.name.lower())
        if plain in _VOC:
            raise ProbeDataError(
                f"{self.name}: its 11-point mAP needs several labels an image, "
                "this layout holds one; rename the set to score it by accuracy"
            )
        return "mean_per_class" if plain in _MEAN_PER_CLASS else "accuracy"

    @property
    def splits(self) -> tuple[Split, ...]:
        """The parts that are there."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        return tuple(split for split in splits if self._find(split) is not None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by class index from classes.txt, None without that file."""
        try:
            text = (self.folder / "classes.txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeDataError(f"{self.folder / 'classes.txt'}: {error}") from error
        return tuple(line.strip() for line in text.splitlines() if line.strip())

    def open(self) -> ProbeSession:
        """A session with the test part sealed; raises ProbeDataError if train or test lacks."""
        for split in ("train", "test"):
            self.path(split)
        return ProbeSession(self)

    def path(self, split: Split) -> Path:
        """The tar of a part; raises ProbeDataError if there is none, or several."""
        path = self._find(split)
        if path is None:
            raise ProbeDataError(f"{self.folder / split}.tar[.gz|.xz] is missing")
        return path

    def _find(self, split: Split) -> Path | None:
        paths = [self.folder / f"{split}{suffix}" for suffix in _SUFFIXES]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise ProbeDataError(f"{self.folder}: {found[0].name} and {found[1].name}, keep one")
        return found[0] if found else None


@dataclass
class ProbeSession:
    """One probe's reading of a set: train and val first, then one choice, then test."""

    dataset: ProbeDataset
    _choices: Choices | None = field(default=None, init=False)

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
        return read_batches(self.dataset.path(split), image_px=image_px)

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
        return read_batches(self.dataset.path("test"), image_px=image_px)


def probe_datasets(root: Path | None = None) -> Mapping[str, ProbeDataset]:
    """The built-in sets and those of `<root>/probe/`, by name; a set of `root` hides its namesake.

    Raises ProbeDataError if `root` is given and cannot be listed. A folder whose name is no
    dataset name is skipped with a warning.
    """
    found = {name: ProbeDataset(name, folder) for name, folder in _folders(BUILT_IN)}
    if root is not None:
        for name, folder in _folders(root / "probe"):
            found[name] = ProbeDataset(name, folder)
    return dict(sorted(found.items()))


def _folders(parent: Path) -> Iterator[tuple[str, Path]]:
    try:
        folders = [path for path in sorted(parent.iterdir()) if path.is_dir()]
    except OSError as error:
        raise ProbeDataError(f"{parent}: the folder of labelled sets: {error}") from error
    for folder in folders:
        if _NAME.fullmatch(folder.name):
            yield folder.name, folder
        else:
            logger.warning("labelled set skipped: not a name", extra={"folder": str(folder)})


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
