"""Published sets as torchvision and their authors lay them out, on tiny trees of each."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.io
from PIL import Image

from synthrep_trainer.probe_data import (
    IMAGE_FOLDER,
    OFFICIAL_SETS,
    ProbeDataError,
    ProbeDataset,
    probe_datasets,
)
from synthrep_trainer.probe_layouts import VOC_CLASSES, entries
from synthrep_trainer.probe_splits import class_names, fingerprint, open_split


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def matrix(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays)


def cifar10(root):
    folder = root / "cifar-10-batches-bin"
    text(folder / "batches.meta.txt", "cat", "dog", "")
    for k, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        row = np.r_[k % 2, np.repeat([10 * k, 1, 2], 1024)].astype(np.uint8)
        row.tofile(folder / f"{name}.bin")


def cifar100(root):
    folder = root / "cifar-100-binary"
    text(folder / "fine_label_names.txt", "cat", "dog")
    for name, label in (("train", 1), ("test", 0)):
        np.r_[9, label, np.zeros(3072)].astype(np.uint8).tofile(folder / f"{name}.bin")


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "F-16A/B", "MD 11")
    for split, line in (("train", "01 707-320"), ("val", "02 F-16A/B"), ("test", "03 MD 11")):
        text(data / f"images_variant_{split}.txt", line)
        image(data / "images" / f"{line[:2]}.jpg")


def cars(root):
    folder = root / "stanford_cars"
    matrix(folder / "devkit" / "cars_meta.mat", class_names=np.array(["Audi", "VW"], object))
    kinds = [("class", int), ("fname", object)]
    for source, split, label in (
        ("devkit/cars_train_annos.mat", "train", 2),
        ("cars_test_annos_withlabels.mat", "test", 1),
    ):
        rows = np.array([(label, "1.jpg"), (label, "2.jpg")], kinds)
        matrix(folder / source, annotations=rows)
        image(folder / f"cars_{split}" / "1.jpg")
        image(folder / f"cars_{split}" / "2.jpg")


def dtd(root):
    folder = root / "dtd" / "dtd"
    for name, split in (("banded", "train"), ("zigzag", "val"), ("zigzag", "test")):
        text(folder / "labels" / f"{split}1.txt", f"{name}/{split}.jpg")
        image(folder / "images" / name / f"{split}.jpg")


def flowers102(root):
    folder = root / "flowers-102"
    matrix(folder / "imagelabels.mat", labels=np.array([[2, 1, 2]]))
    matrix(folder / "setid.mat", trnid=np.array([[1]]), valid=np.array([[2]]), tstid=[[3]])
    for k in (1, 2, 3):
        image(folder / "jpg" / f"image_{k:05d}.jpg")


def pets(root):
    folder = root / "oxford-iiit-pet"
    text(folder / "annotations" / "trainval.txt", "Cat_x_1 1 1 1", "dog_2 2 2 1")
    text(folder / "annotations" / "test.txt", "dog_3 2 2 1")
    for name in ("Cat_x_1", "dog_2", "dog_3"):
        image(folder / "images" / f"{name}.jpg")


def sun397(root):
    folder = root / "SUN397"
    text(folder / "ClassName.txt", "/a/abbey", "/b/bar/indoor")
    text(folder / "Partitions" / "Training_01.txt", "/a/abbey/1.jpg", "/b/bar/indoor/2.jpg")
    text(folder / "Partitions" / "Testing_01.txt", "/b/bar/indoor/3.jpg")
    for name in ("a/abbey/1", "b/bar/indoor/2", "b/bar/indoor/3"):
        image(folder / f"{name}.jpg")


def caltech101(root):
    for name, count in (("BACKGROUND_Google", 31), ("ant", 33)):
        for k in range(count):
            path = root / "caltech101" / "101_ObjectCategories" / name / f"image_{k:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (path.parents[1] / "BACKGROUND_Google" / "tmp").touch()  # comes with the set


def food101(root):
    folder = root / "food-101"
    text(folder / "meta" / "classes.txt", "pie", "soup")
    for split, name in (("train", "pie/1"), ("test", "soup/2")):
        text(folder / "meta" / f"{split}.txt", name)
        image(folder / "images" / f"{name}.jpg")


def voc2007(root):
    folder = root / "VOCdevkit" / "VOC2007"
    for split, stem in (("train", "1"), ("val", "2"), ("test", "3")):
        image(folder / "JPEGImages" / f"{stem}.jpg")
        for k, name in enumerate(VOC_CLASSES):
            meaning = {0: " 1", 1: " 0"}.get(k, "-1")
            text(folder / "ImageSets" / "Main" / f"{name}_{split}.txt", f"{stem} {meaning}")


def imagenet(root):
    for split, name in (("train", "n01"), ("train", "n02"), ("val", "n02")):
        image(root / "imagenet" / split / name / "x.JPEG")


TREES = {
    tree.__name__: tree
    for tree in (
        *(cifar10, cifar100, aircraft, cars, dtd, flowers102, pets, sun397, caltech101),
        *(food101, voc2007, imagenet),
    )
}
FOUND = {  # (labels by split, class names)
    "cifar10": ({"train": [0, 1, 0, 1, 0], "test": [1]}, ("cat", "dog")),
    "cifar100": ({"train": [1], "test": [0]}, ("cat", "dog")),
    "aircraft": ({"train": [0], "val": [1], "test": [2]}, ("707-320", "F-16A/B", "MD 11")),
    "cars": ({"train": [1, 1], "test": [0, 0]}, ("Audi", "VW")),
    "dtd": ({"train": [0], "val": [1], "test": [1]}, ("banded", "zigzag")),
    "flowers102": ({"train": [1], "val": [0], "test": [1]}, ("1", "2")),
    "pets": ({"train": [0, 1], "test": [1]}, ("Cat_x", "dog")),
    "sun397": ({"train": [0, 1], "test": [1]}, ("a/abbey", "b/bar/indoor")),
    "food101": ({"train": [0], "test": [1]}, ("pie", "soup")),
    "voc2007": (
        {split: [[1, -1, *[0] * 18]] for split in ("train", "val", "test")},
        VOC_CLASSES,
    ),
    "imagenet": ({"train": [0, 1], "test": [1]}, ("n01", "n02")),
}


@pytest.fixture
def find(tmp_path):
    def found(name):
        TREES[name](tmp_path)
        return probe_datasets(originals=tmp_path)[name]

    return found


@pytest.mark.parametrize("name", FOUND)
def test_a_published_set_has_its_own_splits_labels_and_names(find, name):
    dataset, (labels, names) = find(name), FOUND[name]
    assert dataset.splits == tuple(labels)
    assert class_names(dataset) == names
    for split, expected in labels.items():
        (batch,) = open_split(dataset, split, image_px=4)
        assert batch.labels.tolist() == expected
        assert batch.images.shape == (len(expected), 4, 4, 3)


def test_published_sets_are_scored_by_their_own_metrics(tmp_path):
    for tree in TREES.values():
        tree(tmp_path)
    found = probe_datasets(originals=tmp_path)
    assert found.keys() >= OFFICIAL_SETS.keys()
    metrics = {name: found[name].metric for name in OFFICIAL_SETS}
    by_class = {name for name, metric in metrics.items() if metric == "mean_per_class"}
    assert by_class == {"aircraft", "flowers102", "pets", "caltech101"}
    assert {name for name, metric in metrics.items() if metric == "map_11point"} == {"voc2007"}


def test_caltech_trains_on_thirty_images_a_class_and_tests_on_the_rest(find):
    dataset = find("caltech101")
    train, test = entries(dataset, "train"), entries(dataset, "test")
    assert [entry.label for entry in train] == [0] * 30 + [1] * 30
    assert [entry.label for entry in test] == [0] + [1] * 3
    assert not {entry.path for entry in train} & {entry.path for entry in test}
    assert entries(dataset, "train") == train


def test_cifar_pixels_are_planes_of_red_green_and_blue(find):
    (batch,) = open_split(find("cifar10"), "train", image_px=32)
    assert batch.images[3, 5, 7].tolist() == [30, 1, 2]


def test_a_cifar_file_that_is_cut_is_refused(find):
    dataset = find("cifar100")
    path = dataset.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProbeDataError, match="it is cut"):
        list(open_split(dataset, "train", image_px=4))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: text(folder / "meta" / "train.txt", "../../../etc/x"), "no class"),
        (lambda folder: text(folder / "meta" / "train.txt", "pie/../../../secret"), "leads out"),
        (lambda folder: text(folder / "meta" / "train.txt", "cake/1"), "'cake' is no class"),
        (lambda folder: text(folder / "meta" / "train.txt", "pie/9"), "9.jpg is missing"),
        (lambda folder: text(folder / "meta" / "train.txt", ""), "no labelled image"),
        (lambda folder: (folder / "meta" / "train.txt").unlink(), "No such file"),
        (lambda folder: (folder / "meta" / "train.txt").write_bytes(b"\xff"), "can't decode"),
        (lambda folder: (folder / "images/pie/1.jpg").write_bytes(b"x"), "cannot be decoded"),
        (lambda folder: (folder / "images/pie/1.jpg").write_bytes(bytes(2**25 + 1)), "more than"),
    ],
)
def test_a_set_that_is_not_as_its_lists_say_is_refused(find, damage, words):
    dataset = find("food101")
    image(dataset.folder.parent / "secret.jpg")
    damage(dataset.folder)
    with pytest.raises(ProbeDataError, match=words):
        list(open_split(dataset, "train", image_px=4))


def test_a_matlab_file_at_fault_is_named(find):
    dataset = find("cars")
    (dataset.folder / "devkit" / "cars_train_annos.mat").write_bytes(b"x" * 300)
    with pytest.raises(ProbeDataError, match=r"cars_train_annos\.mat: the MATLAB file"):
        entries(dataset, "train")


def test_voc_lists_that_name_other_images_are_refused(find):
    dataset = find("voc2007")
    text(dataset.folder / "ImageSets" / "Main" / "dog_train.txt", "7 -1")
    with pytest.raises(ProbeDataError, match="name other images"):
        entries(dataset, "train")


@pytest.fixture
def folders(tmp_path):
    for name in ("train/cat/1.png", "train/dog/sub/2.jpg", "test/dog/3.jpg"):
        image(tmp_path / name)
    return ProbeDataset("own", tmp_path, IMAGE_FOLDER)


def test_an_image_folder_is_read_by_class(folders):
    assert (folders.splits, folders.metric) == (("train", "test"), "accuracy")
    assert class_names(folders) == ("cat", "dog")
    assert [entry.label for entry in entries(folders, "train")] == [0, 1]
    assert [entry.label for entry in entries(folders, "test")] == [1]


def test_an_image_folder_at_fault_is_refused(folders, tmp_path):
    with pytest.raises(ProbeDataError, match=r"own: .*val is missing"):
        entries(folders, "val")
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(ProbeDataError, match="'cow' is no class"):
        entries(folders, "test")
    text(tmp_path / "train" / "cat" / "readme.txt", "x")
    with pytest.raises(ProbeDataError, match=r"readme\.txt is no JPEG, PNG or WebP"):
        entries(folders, "train")


def test_a_class_folder_without_images_is_refused(folders, tmp_path):
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ProbeDataError, match="cow holds no image"):
        entries(folders, "train")


def test_a_link_out_of_the_set_is_not_followed(folders, tmp_path_factory, tmp_path):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.jpg"
    image(secret)
    (tmp_path / "train" / "cat" / "2.jpg").symlink_to(secret)
    with pytest.raises(ProbeDataError, match="leads out of the set's folder"):
        entries(folders, "train")


@pytest.mark.parametrize("name", ["cifar10", "food101"])
def test_a_fingerprint_changes_with_the_files_of_its_split(find, name):
    dataset = find(name)
    before = fingerprint(dataset, "train"), fingerprint(dataset, "test")
    changed = "test_batch.bin" if name == "cifar10" else "images/soup/2.jpg"
    with (dataset.folder / changed).open("ab") as stream:
        stream.write(b"more")
    assert fingerprint(dataset, "train") == before[0]
    assert fingerprint(dataset, "test") != before[1]


def test_a_fingerprint_changes_where_the_time_of_a_file_was_set_back(find):
    dataset = find("food101")
    before, path = fingerprint(dataset, "test"), dataset.folder / "images/soup/2.jpg"
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # until the kernel's clock has ticked
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(dataset, "test") != before


def test_names_that_are_no_text_are_read_as_files_and_refused_as_classes(folders):
    cat = folders.folder / "train" / "cat"
    (cat / "1.png").rename(cat / os.fsdecode(b"\xff.png"))
    assert len(fingerprint(folders, "train")) == 64
    cat.rename(cat.with_name(os.fsdecode(b"\xff")))
    with pytest.raises(ProbeDataError, match="is no text"):
        class_names(folders)
