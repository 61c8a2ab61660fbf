"""Labelled sets that users bring."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthrep_trainer import probe_uploads
from synthrep_trainer.probe_data import ProbeDataError, probe_datasets
from synthrep_trainer.probe_splits import class_names, open_split
from synthrep_trainer.probe_uploads import NameTakenError, accept_folder, accept_zip


def png(shade=0):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def zipped(files, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in files:
            archive.writestr(name, data)
    stream.seek(0)
    return stream


IMAGES = [(f"{name}/{k}.png", png(10 * k)) for name in ("dog", "cat") for k in range(10)]


@pytest.fixture
def sets(tmp_path):
    return tmp_path / "runs" / "probe-sets"


def accept(stream, sets, name="mine", max_bytes=2**20):
    return accept_zip(stream, name, sets=sets, max_bytes=max_bytes)


def labels_of(dataset, split):
    return sorted(np.concatenate([b.labels for b in open_split(dataset, split, image_px=4)]))


def test_a_zip_of_classes_becomes_a_set_with_a_fifth_for_test(sets):
    dataset = accept(zipped([*IMAGES, ("__MACOSX/dog/1.png", b"x"), ("dog/.DS_Store", b"")]), sets)
    assert probe_datasets(uploads=sets)["mine"] == dataset
    assert class_names(dataset) == ("cat", "dog")
    assert labels_of(dataset, "train") == [0] * 8 + [1] * 8
    assert labels_of(dataset, "test") == [0] * 2 + [1] * 2


def test_splits_of_a_zip_are_kept(sets):
    images = [(f"{s}/{c}/1.png", png()) for s in ("train", "val", "test") for c in ("a", "b")]
    dataset = accept(zipped(images[:-1]), sets)
    assert dataset.splits == ("train", "val", "test")
    assert labels_of(dataset, "test") == [0]


def test_equal_zips_make_equal_sets_whatever_their_order(sets):
    first = accept(zipped(IMAGES), sets, "first")
    again = accept(zipped(IMAGES[::-1]), sets, "again")
    for split in ("train", "test"):
        assert first.path(split).read_bytes() == again.path(split).read_bytes()


def link():
    info = zipfile.ZipInfo("dog/link.png")
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("../dog/1.png", png())], "neither class/image"),
        ([("../1.png", png())], "neither class/image"),
        ([("/dog/1.png", png())], "neither class/image"),
        ([("dog/../1.png", png())], "neither class/image"),
        ([("a\\..\\dog/1.png", png())], "neither class/image"),
        ([("1.png", png())], "neither class/image"),
        ([("x/dog/1.png", png())], "neither class/image"),
        ([("dog\n/1.png", png())], "neither class/image"),
        ([("dog\u2028cat/1.png", png())], "neither class/image"),
        ([("\u3000/1.png", png())], "neither class/image"),
        ([("dog/1.exe", b"MZ")], "no JPEG, PNG or WebP"),
        ([("dog/x.png", b"MZ\x00")], "not the image that its name"),
        ([(link(), "/etc/passwd")], "a link"),
        ([("train/dog/1.png", png())], "some do not"),
    ],
)
def test_what_does_not_belong_in_a_set_is_refused(sets, tmp_path, files, words):
    with pytest.raises(ProbeDataError, match=words):
        accept(zipped([*IMAGES, *files]), sets)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no image"),
        ([("dog/1.png", png()), ("dog/2.png", png())], "one class only"),
        ([("dog/1.png", png()), ("cat/1.png", png())], "one image only"),
        ([("train/a/1.png", png()), ("train/b/1.png", png())], "both train and test"),
        (
            [(f"{where}/1.png", png()) for where in ("train/a", "train/b", "test/c")],
            "test has a class 'c', train has not",
        ),
    ],
)
def test_a_zip_that_is_no_set_is_refused(sets, files, words):
    with pytest.raises(ProbeDataError, match=words):
        accept(zipped(files), sets)


def test_a_bomb_is_not_unpacked(sets, monkeypatch):
    bomb = zipped([*IMAGES, ("dog/x.png", bytes(2**22))], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # any look inside would fail
    with pytest.raises(ProbeDataError, match="unpacks to more than 1048576 bytes"):
        accept(bomb, sets)


def test_a_bomb_that_lies_about_its_size_is_refused(sets):
    data = zipped([*IMAGES, ("dog/x.png", png() + bytes(2**20))], compression=8).getvalue()
    size = struct.pack("<I", len(png()) + 2**20)
    assert data.count(size) == 2  # before the member and in the list
    lie = io.BytesIO(data.replace(size, struct.pack("<I", 99)))
    with pytest.raises(ProbeDataError, match="cannot be read|is not the image"):
        accept(lie, sets)


def test_a_list_of_members_that_is_too_long_is_not_read(sets, monkeypatch):
    monkeypatch.setattr(probe_uploads, "MAX_DIRECTORY_BYTES", 500)
    with pytest.raises(ProbeDataError, match="too many members"):
        accept(zipped(IMAGES), sets)


@pytest.mark.parametrize("cut", [1, 100, 1500])
def test_a_damaged_zip_is_refused(sets, cut):
    data = zipped(IMAGES).getvalue()
    with pytest.raises(ProbeDataError, match="cannot be read"):
        accept(io.BytesIO(data[:-cut]), sets)
    flipped = bytearray(data)
    flipped[data.index(png(50)) + 40] ^= 255
    with pytest.raises(ProbeDataError, match="cannot be read"):
        accept(io.BytesIO(flipped), sets)
    assert list(sets.iterdir()) == []


@pytest.mark.parametrize("name", [b"\xff\xff", b"\0\0"], ids=["no UTF-8", "empty"])
def test_a_name_that_is_no_text_is_refused(sets, name):
    data = zipped([*IMAGES, ("é", b"")]).getvalue().replace("é".encode(), name)
    with pytest.raises(ProbeDataError, match="cannot be read"):
        accept(io.BytesIO(data), sets)


def test_a_damaged_image_that_was_packed_by_lzma_is_refused(sets):
    data = bytearray(zipped(IMAGES, compression=zipfile.ZIP_LZMA).getvalue())
    start = data.index(b"dog/0.png") + len(b"dog/0.png")
    data[start + 9 : start + 40] = b"\xff" * 31
    with pytest.raises(ProbeDataError, match="cannot be read"):
        accept(io.BytesIO(data), sets)


def test_a_name_is_taken_once(sets):
    accept(zipped(IMAGES), sets)
    with pytest.raises(NameTakenError):
        accept(zipped(IMAGES), sets)


@pytest.fixture
def folder(tmp_path):
    for name in ("train/cat", "train/dog", "test/dog"):
        path = tmp_path / "allowed" / "own" / name
        path.mkdir(parents=True)
        (path / "1.png").write_bytes(png())
    return tmp_path / "allowed" / "own"


def test_a_folder_is_read_where_it_lies(sets, folder):
    dataset = accept_folder(folder, "mine", sets=sets, allowed_roots=[folder.parent])
    assert probe_datasets(uploads=sets)["mine"] == dataset
    assert labels_of(dataset, "train") == [0, 1]


def test_a_folder_outside_of_the_allowed_roots_is_refused(sets, folder, tmp_path):
    (tmp_path / "allowed" / "way-out").symlink_to(tmp_path)
    for path in (folder / ".." / "..", tmp_path, tmp_path / "allowed" / "way-out", tmp_path / "no"):
        with pytest.raises(ProbeDataError, match="no allowed root"):
            accept_folder(path, "mine", sets=sets, allowed_roots=[tmp_path / "allowed"])
    with pytest.raises(ProbeDataError, match="no allowed root"):
        accept_folder(folder, "mine", sets=sets, allowed_roots=[])


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 5000, "/\ud800"])
def test_what_is_no_path_is_refused(sets, path):
    with pytest.raises(ProbeDataError):
        accept_folder(Path(path), "mine", sets=sets, allowed_roots=[Path("/allowed")])


def test_a_folder_without_both_parts_is_refused(sets, folder):
    with pytest.raises(ProbeDataError, match="must hold train and test"):
        accept_folder(folder / "train", "mine", sets=sets, allowed_roots=[folder])
