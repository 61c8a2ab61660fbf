"""What lies where in the labelled sets that torchvision and their authors distribute.

`entries` names the images of a split with their labels, in a fixed order, from the lists that come
with a set; `class_names` has the names by class index. Lists are not trusted: a path that leaves
the set's folder, an unknown class or an image that is not there is refused. The splits are the
official ones. Caltech-101 has none: 30 images a class train, drawn once with a fixed seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from synthrep_trainer.probe_data import ProbeDataError, ProbeDataset, Split
from synthrep_trainer.probe_lists import class_indices, fields, index_of, lines, matrix, number

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
CALTECH_TRAIN_PER_CLASS = 30
VOC_POSITIVE, VOC_DIFFICULT, VOC_NEGATIVE = 1, -1, 0
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

Label = int | tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One image and its class index, or for several labels VOC_… for each class."""

    path: Path
    label: Label


Lister = Callable[[Path, Split], Iterable[Entry]]
Namer = Callable[[Path], tuple[str, ...]]


def entries(dataset: ProbeDataset, split: Split) -> list[Entry]:
    """The images of a split; raises ProbeDataError where the set is not laid out as it should be.

    Paths are checked to lie inside the set's folder and to exist.
    """
    dataset.require(split)
    root = dataset.folder.resolve()
    found = []
    for entry in _layout(dataset).lister(dataset.folder, split):
        path = entry.path.resolve()
        if not path.is_relative_to(root):
            raise ProbeDataError(f"{entry.path} leads out of the set's folder")
        if not path.is_file():
            raise ProbeDataError(f"{entry.path} is missing")
        found.append(Entry(path, entry.label))
    if not found:
        raise ProbeDataError(f"{dataset.name}: {split} holds no labelled image")
    return found


def class_names(dataset: ProbeDataset) -> tuple[str, ...]:
    """The names of a set's classes by index."""
    return _layout(dataset).namer(dataset.folder)


@dataclass(frozen=True)
class _Layout:
    lister: Lister
    namer: Namer


def _layout(dataset: ProbeDataset) -> _Layout:
    try:
        return _LAYOUTS[dataset.layout]
    except KeyError:
        raise ProbeDataError(f"{dataset.name}: no layout {dataset.layout!r} of files") from None


def _folders(parent: Path) -> tuple[str, ...]:
    """The class folders of a split, sorted as ImageFolder sorts them."""
    try:
        names = tuple(sorted(path.name for path in parent.iterdir() if path.is_dir()))
    except OSError as error:
        raise ProbeDataError(f"{parent}: {error}") from error
    if not names:
        raise ProbeDataError(f"{parent} holds no class folder")
    for name in names:
        if name.encode(errors="ignore").decode() != name:  # bytes that are no UTF-8
            raise ProbeDataError(f"{parent}: the name {name!r} of a class is no text")
    return names


def _images(folder: Path) -> list[Path]:
    """The images below a class folder; raises ProbeDataError for none, or for another file."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ProbeDataError(f"{path} is no JPEG, PNG or WebP")
    if not paths:
        raise ProbeDataError(f"{folder} holds no image")
    return paths


def _image_folder(splits: Mapping[Split, str]) -> _Layout:
    """`<split>/<class>/…`; the classes are those of train."""

    def names(folder: Path) -> tuple[str, ...]:
        return _folders(folder / splits["train"])

    def listed(folder: Path, split: Split) -> Iterator[Entry]:
        parent, indices = folder / splits[split], class_indices(names(folder))
        for name in _folders(parent):
            label = index_of(indices, name, parent)
            for path in _images(parent / name):
                yield Entry(path, label)

    return _Layout(listed, names)


def _aircraft_names(folder: Path) -> tuple[str, ...]:
    return tuple(lines(folder / "data" / "variants.txt"))


def _aircraft(folder: Path, split: Split) -> Iterator[Entry]:
    source = folder / "data" / f"images_variant_{split}.txt"
    indices = class_indices(_aircraft_names(folder))
    for line in lines(source):
        name, variant = fields(line, 2, source)
        path = folder / "data" / "images" / f"{name}.jpg"
        yield Entry(path, index_of(indices, variant, source))


def _cars_names(folder: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in matrix(folder / "devkit" / "cars_meta.mat", "class_names"))


def _cars(folder: Path, split: Split) -> Iterator[Entry]:
    source = {
        "train": folder / "devkit" / "cars_train_annos.mat",
        "test": folder / "cars_test_annos_withlabels.mat",
    }[split]
    for row in matrix(source, "annotations"):
        path = folder / f"cars_{split}" / str(row["fname"])
        yield Entry(path, number(row["class"], source) - 1)


def _dtd_names(folder: Path) -> tuple[str, ...]:
    return _folders(folder / "images")


def _dtd(folder: Path, split: Split) -> Iterator[Entry]:
    source, indices = folder / "labels" / f"{split}1.txt", class_indices(_dtd_names(folder))
    for name in lines(source):
        label = index_of(indices, PurePosixPath(name).parts[0], source)
        yield Entry(folder / "images" / name, label)


def _flowers_names(folder: Path) -> tuple[str, ...]:
    """The set comes without names; its classes are numbered from 1."""
    labels = matrix(folder / "imagelabels.mat", "labels")
    return tuple(str(label) for label in range(1, int(labels.max()) + 1))


def _flowers(folder: Path, split: Split) -> Iterator[Entry]:
    labels = matrix(folder / "imagelabels.mat", "labels")
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    for image in matrix(folder / "setid.mat", key):
        if not 1 <= image <= len(labels):
            raise ProbeDataError(f"{folder / 'setid.mat'}: there is no image {image}")
        path = folder / "jpg" / f"image_{image:05d}.jpg"
        yield Entry(path, int(labels[image - 1]) - 1)


def _pets_rows(folder: Path, split: Split) -> Iterator[tuple[str, int]]:
    name = "trainval" if split == "train" else "test"
    source = folder / "annotations" / f"{name}.txt"
    for line in lines(source):
        image, class_number, _ = fields(line, 3, source)
        yield image, number(class_number, source) - 1


def _pets_names(folder: Path) -> tuple[str, ...]:
    names = {label: image.rpartition("_")[0] for image, label in _pets_rows(folder, "train")}
    return tuple(names.get(label, str(label + 1)) for label in range(max(names, default=-1) + 1))


def _pets(folder: Path, split: Split) -> Iterator[Entry]:
    for image, label in _pets_rows(folder, split):
        yield Entry(folder / "images" / f"{image}.jpg", label)


def _sun397_lists(folder: Path) -> Path:
    """Where the authors' partitions were unpacked."""
    below = folder / "Partitions"
    return below if below.is_dir() else folder


def _sun397_names(folder: Path) -> tuple[str, ...]:
    parent = folder if (folder / "ClassName.txt").is_file() else _sun397_lists(folder)
    return tuple(line.strip("/") for line in lines(parent / "ClassName.txt"))


def _sun397(folder: Path, split: Split) -> Iterator[Entry]:
    """The authors' first partition; each line is `/a/abbey/sun_….jpg`."""
    name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    source, indices = _sun397_lists(folder) / name, class_indices(_sun397_names(folder))
    for line in lines(source):
        image = line.strip("/")
        label = index_of(indices, str(PurePosixPath(image).parent), source)
        yield Entry(folder / image, label)


def _caltech_names(folder: Path) -> tuple[str, ...]:
    """All 102 folders, the background among them."""
    return _folders(folder)


def _caltech(folder: Path, split: Split) -> Iterator[Entry]:
    """The images alone: BACKGROUND_Google comes with a file `tmp` beside them."""
    for label, name in enumerate(_caltech_names(folder)):
        paths = sorted((folder / name).glob("image_*.jpg"))
        if len(paths) <= CALTECH_TRAIN_PER_CLASS:
            raise ProbeDataError(f"{folder / name} has {len(paths)} images, none is left for test")
        drawn = set(random.Random(f"caltech101/{name}").sample(paths, CALTECH_TRAIN_PER_CLASS))
        for path in paths:
            if (path in drawn) == (split == "train"):
                yield Entry(path, label)


def _food_names(folder: Path) -> tuple[str, ...]:
    return tuple(lines(folder / "meta" / "classes.txt"))


def _food(folder: Path, split: Split) -> Iterator[Entry]:
    source, indices = folder / "meta" / f"{split}.txt", class_indices(_food_names(folder))
    for name in lines(source):
        label = index_of(indices, PurePosixPath(name).parts[0], source)
        yield Entry(folder / "images" / f"{name}.jpg", label)


def _voc(folder: Path, split: Split) -> Iterator[Entry]:
    """`ImageSets/Main/<class>_<split>.txt` say 1, 0 (difficult) or -1 for each image."""
    meanings = {"1": VOC_POSITIVE, "0": VOC_DIFFICULT, "-1": VOC_NEGATIVE}
    lists = folder / "ImageSets" / "Main"
    columns: list[dict[str, int]] = []
    for name in VOC_CLASSES:
        source, column = lists / f"{name}_{split}.txt", {}
        for line in lines(source):
            image, meaning = fields(line, 2, source)
            column[image] = index_of(meanings, meaning, source)
        columns.append(column)
        if column.keys() != columns[0].keys():
            raise ProbeDataError(f"{source} and that of {VOC_CLASSES[0]} name other images")
    for image in columns[0]:
        path = folder / "JPEGImages" / f"{image}.jpg"
        yield Entry(path, tuple(column[image] for column in columns))


_LAYOUTS: Mapping[str, _Layout] = {
    "image-folder": _image_folder({"train": "train", "val": "val", "test": "test"}),
    "imagenet": _image_folder({"train": "train", "test": "val"}),
    "aircraft": _Layout(_aircraft, _aircraft_names),
    "cars": _Layout(_cars, _cars_names),
    "dtd": _Layout(_dtd, _dtd_names),
    "flowers102": _Layout(_flowers, _flowers_names),
    "pets": _Layout(_pets, _pets_names),
    "sun397": _Layout(_sun397, _sun397_names),
    "caltech101": _Layout(_caltech, _caltech_names),
    "food101": _Layout(_food, _food_names),
    "voc2007": _Layout(_voc, lambda folder: VOC_CLASSES),
}
