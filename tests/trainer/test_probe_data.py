"""The registry of labelled sets, and the sets that travel with the package."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from synthrep_trainer.probe_archive import read_batches
from synthrep_trainer.probe_data import BUILT_IN, ProbeDataError, ProbeDataset, probe_datasets

BUILT_IN_NAMES = ["clipart", "digits", "emoji", "fashion"]


def write_split(path, pixel_values):
    """One 4 px image a value, labelled 0, 1, 0, 1, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, value in enumerate(pixel_values):
            stream = io.BytesIO()
            Image.new("RGB", (4, 4), (value,) * 3).save(stream, "PNG")
            for suffix, data in (("png", stream.getvalue()), ("cls", b"%d" % (index % 2))):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def load(dataset, split, image_px):
    batches = list(read_batches(dataset.path(split), image_px=image_px))
    images = np.concatenate([batch.images for batch in batches])
    return images, np.concatenate([batch.labels for batch in batches])


@pytest.fixture(scope="module")
def built_in():
    """name -> split -> (images, labels), at 32 px."""
    return {
        name: {split: load(dataset, split, 32) for split in ("train", "test")}
        for name, dataset in probe_datasets().items()
    }


@pytest.fixture
def root(tmp_path):
    """A folder of labelled sets with one set in it."""
    for split in ("train", "test"):
        write_split(tmp_path / "probe" / "cats_2" / f"{split}.tar", [0, 255])
    return tmp_path


def test_four_sets_travel_with_the_package():
    assert list(probe_datasets()) == BUILT_IN_NAMES


def test_built_in_sets_have_a_thousand_test_images_and_all_classes(built_in):
    for name, dataset in probe_datasets().items():
        (_, train), (_, test) = built_in[name]["train"], built_in[name]["test"]
        assert len(test) >= 1_000
        assert set(train) == set(test) == set(range(len(dataset.class_names)))
        assert dataset.metric == "accuracy"


def test_two_built_in_sets_are_in_colour(built_in):
    coloured = {
        name for name, splits in built_in.items() if np.ptp(splits["test"][0], axis=3).max() > 50
    }
    assert coloured == {"clipart", "emoji"}


def test_no_built_in_test_image_has_a_twin_in_train(built_in):
    for name, splits in built_in.items():
        train, test = (splits[split][0].reshape(-1, 32 * 32 * 3) for split in ("train", "test"))
        ink, other = 255 - test.astype(np.float32), 255 - train.astype(np.float32)
        energy = (ink**2).sum(1)[:, None] + (other**2).sum(1)
        apart = np.sqrt(np.maximum(energy - 2 * ink @ other.T, 0) / energy)
        # Colour drawings are freed of near-duplicates; photos of one kind of shirt may be close.
        assert apart.min() > (0.1 if name in ("clipart", "emoji") else 0.01), name


def test_built_in_sets_are_small_and_say_where_they_come_from():
    files = [path for path in BUILT_IN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6
    for name in BUILT_IN_NAMES:
        text = (BUILT_IN / name / "README.md").read_text()
        assert "Source:" in text
        assert "Licence:" in text


def test_sets_of_the_given_folder_are_added_under_their_names(root):
    sets = probe_datasets(root)
    assert list(sets) == sorted([*BUILT_IN_NAMES, "cats_2"])
    images, labels = load(sets["cats_2"], "test", 4)
    assert images[:, 0, 0, 0].tolist() == [0, 255]
    assert labels.tolist() == [0, 1]


def test_a_set_of_the_given_folder_hides_its_namesake(root):
    write_split(root / "probe" / "digits" / "train.tar", [0, 255])
    assert probe_datasets(root)["digits"].folder == root / "probe" / "digits"


def test_a_folder_that_is_no_name_is_skipped_with_a_warning(root, caplog):
    (root / "probe" / "no name").mkdir()
    assert "no name" not in probe_datasets(root)
    assert "labelled set skipped" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(ProbeDataError, match="folder of labelled sets"):
        probe_datasets(tmp_path / "absent")


@pytest.mark.parametrize(
    "name",
    ["caltech101", "Caltech-101", "flowers102", "oxford_flowers_102", "pets", "oxford-iiit-pets",
     "aircraft", "fgvc_aircraft"],
)  # fmt: skip
def test_four_of_the_eleven_take_the_mean_per_class(tmp_path, name):
    assert ProbeDataset(name, tmp_path).metric == "mean_per_class"


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "stanford_cars", "dtd", "sun397", "food101", "flowers102_part"]
)
def test_other_names_take_accuracy(tmp_path, name):
    assert ProbeDataset(name, tmp_path).metric == "accuracy"


def test_a_multi_label_set_is_refused(tmp_path):
    with pytest.raises(ProbeDataError, match="several labels an image"):
        _ = ProbeDataset("voc2007", tmp_path).metric


def test_parts_are_found_packed_or_plain(tmp_path):
    for name in ("train.tar.xz", "test.tar", "val.tar.gz"):
        (tmp_path / name).touch()
    dataset = ProbeDataset("x", tmp_path)
    assert dataset.splits == ("train", "val", "test")
    assert dataset.path("val") == tmp_path / "val.tar.gz"


def test_a_missing_or_doubled_part_is_an_error(tmp_path):
    dataset = ProbeDataset("x", tmp_path)
    with pytest.raises(ProbeDataError, match=r"test.tar\[.gz\|.xz\] is missing"):
        dataset.path("test")
    (tmp_path / "test.tar").touch()
    (tmp_path / "test.tar.gz").touch()
    with pytest.raises(ProbeDataError, match="keep one"):
        dataset.path("test")


def test_class_names_are_the_lines_of_a_file_that_may_be_absent(tmp_path):
    dataset = ProbeDataset("x", tmp_path)
    assert dataset.class_names is None
    (tmp_path / "classes.txt").write_text("dog\n a cat \nBär\n\n", encoding="utf-8")
    assert dataset.class_names == ("dog", "a cat", "Bär")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ProbeDataError, match=r"classes\.txt"):
        _ = dataset.class_names
