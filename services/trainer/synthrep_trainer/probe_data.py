"""The labelled sets that probes may name: where they lie and how they are scored.

The sets in `probe_sets/` travel with the package. Those in `<root>/probe/NAME/` are added under
their names and win over built-in ones. Nothing is opened here, so the API can list them without
any library for arrays or images.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from synthrep_shared.errors import SynthRepError

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "mean_per_class"]
Split = Literal["train", "val", "test"]

BUILT_IN = Path(__file__).parent / "probe_sets"
_SUFFIXES = (".tar", ".tar.gz", ".tar.xz")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# Of the paper's eleven sets, those whose score is the mean over classes, as they are often spelled
# (without case and punctuation).
_MEAN_PER_CLASS = frozenset(
    {"aircraft", "fgvcaircraft", "caltech101", "flowers", "flowers102", "oxfordflowers102"}
    | {"pets", "oxfordpets", "oxfordiiitpets", "oxfordiiitpet"}
)
_VOC = frozenset({"voc2007", "pascalvoc2007"})


class ProbeDataError(SynthRepError):
    """A labelled set is absent, damaged or contradicts itself; the message names the place."""


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
        return tuple(line.strip() for line in text.rstrip().splitlines())

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
