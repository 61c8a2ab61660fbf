"""The labelled sets that probes may name: where they lie and how they are scored.

The sets in `probe_sets/` travel with the package. Sets as torchvision and their authors lay them
out are found below a folder of originals, uploaded ones below the folder of runs, tars in
`<root>/probe/NAME/`; of equal names the later wins. Nothing is opened here, so the API can list
them without any library for arrays or images.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from synthrep_shared.errors import SynthRepError
from synthrep_trainer.settings import TrainerSettings

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "mean_per_class", "map_11point"]
Split = Literal["train", "val", "test"]
TAR = "tar"
IMAGE_FOLDER = "image-folder"
LINK = "link.json"  # in the place of an uploaded set: `{"folder": …, "layout": …}`

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


@dataclass(frozen=True)
class OfficialSet:
    """Where a published set lies below a folder of originals, and how it is scored."""

    folders: tuple[str, ...]
    """Below the folder of originals; the first that exists is taken."""
    metric: Metric
    has_val: bool = False


OFFICIAL_SETS: Mapping[str, OfficialSet] = {
    "cifar10": OfficialSet(("cifar-10-batches-bin",), "accuracy"),
    "cifar100": OfficialSet(("cifar-100-binary",), "accuracy"),
    "aircraft": OfficialSet(("fgvc-aircraft-2013b",), "mean_per_class", has_val=True),
    "cars": OfficialSet(("stanford_cars",), "accuracy"),
    "dtd": OfficialSet(("dtd/dtd", "dtd"), "accuracy", has_val=True),
    "flowers102": OfficialSet(("flowers-102",), "mean_per_class", has_val=True),
    "pets": OfficialSet(("oxford-iiit-pet",), "mean_per_class"),
    "sun397": OfficialSet(("SUN397",), "accuracy"),
    "caltech101": OfficialSet(
        ("caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories"), "mean_per_class"
    ),
    "food101": OfficialSet(("food-101",), "accuracy"),
    "voc2007": OfficialSet(("VOCdevkit/VOC2007",), "map_11point", has_val=True),
    "imagenet": OfficialSet(("imagenet",), "accuracy"),
}


class ProbeDataError(SynthRepError):
    """A labelled set is absent, damaged or contradicts itself; the message names the place."""


@dataclass(frozen=True)
class ProbeDataset:
    """One labelled set: `<folder>/{train,test}.tar[.gz|.xz]`, optional `val` and classes.txt.

    `layout` is a key of OFFICIAL_SETS for a published set and IMAGE_FOLDER for
    `<folder>/{train,test}/<class>/…`. Nothing is opened before it is used; a damaged set fails
    where it is read.
    """

    name: str
    folder: Path
    layout: str = TAR

    @property
    def metric(self) -> Metric:
        """The published set's own; else accuracy, unless the name is one of the eleven."""
        if self.layout in OFFICIAL_SETS:
            return OFFICIAL_SETS[self.layout].metric
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
        if self.layout in OFFICIAL_SETS:
            return splits if OFFICIAL_SETS[self.layout].has_val else ("train", "test")
        if self.layout == IMAGE_FOLDER:
            return tuple(split for split in splits if (self.folder / split).is_dir())
        return tuple(split for split in splits if self._find(split) is not None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by class index from classes.txt, None without that file or for another layout."""
        if self.layout != TAR:
            return None
        try:
            text = (self.folder / "classes.txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeDataError(f"{self.folder / 'classes.txt'}: {error}") from error
        return tuple(line.strip() for line in text.rstrip().splitlines())

    def require(self, split: Split) -> None:
        """Raises ProbeDataError if a part is missing."""
        if self.layout == TAR:
            self.path(split)
        elif split not in self.splits:
            raise ProbeDataError(f"{self.name}: {self.folder / split} is missing")

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


def probe_datasets(
    root: Path | None = None, *, originals: Path | None = None, uploads: Path | None = None
) -> Mapping[str, ProbeDataset]:
    """All sets by name: built-in, published ones, uploaded ones, and those of `<root>/probe/`.

    Of equal names the later of these wins. Raises ProbeDataError if `root` is given and cannot be
    listed. A folder whose name is no dataset name is skipped with a warning.
    """
    found = {name: ProbeDataset(name, folder) for name, folder in _folders(BUILT_IN)}
    if originals is not None:
        found.update(_originals(originals))
    if uploads is not None and uploads.is_dir():
        for name, folder in _folders(uploads):
            found[name] = _uploaded(name, folder)
    if root is not None:
        for name, folder in _folders(root / "probe"):
            found[name] = ProbeDataset(name, folder)
    return dict(sorted(found.items()))


def known_datasets(settings: TrainerSettings) -> Mapping[str, ProbeDataset]:
    """All sets that a service with these settings knows; raises ProbeDataError as above."""
    return probe_datasets(
        settings.probe_data, originals=settings.probe_originals, uploads=uploads_of(settings)
    )


def uploads_of(settings: TrainerSettings) -> Path:
    """The folder of uploaded sets; it may not be there yet."""
    return settings.runs / "probe-sets"


def _originals(parent: Path) -> Iterator[tuple[str, ProbeDataset]]:
    for name, official in OFFICIAL_SETS.items():
        for folder in official.folders:
            if (parent / folder).is_dir():
                yield name, ProbeDataset(name, parent / folder, name)
                break


def _uploaded(name: str, folder: Path) -> ProbeDataset:
    try:
        link = json.loads((folder / LINK).read_bytes())
    except FileNotFoundError:
        return ProbeDataset(name, folder)
    return ProbeDataset(name, Path(link["folder"]), link["layout"])


def _folders(parent: Path) -> Iterator[tuple[str, Path]]:
    try:
        folders = [path for path in sorted(parent.iterdir()) if path.is_dir()]
    except OSError as error:
        raise ProbeDataError(f"{parent}: the folder of labelled sets: {error}") from error
    for folder in folders:
        if folder.name.startswith("."):
            continue  # written aside
        if _NAME.fullmatch(folder.name):
            yield folder.name, folder
        else:
            logger.warning("labelled set skipped: not a name", extra={"folder": str(folder)})
