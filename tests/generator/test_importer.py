"""Images that exist become a data set that is whole, and stays so when the import is cut off."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthrep_generator import importer
from synthrep_generator.image_folder import find_images
from synthrep_generator.importer import import_images
from synthrep_generator.intake import is_paused, list_batches
from synthrep_generator.verify import verify_dataset
from synthrep_shared.commit_log import read_log
from synthrep_shared.errors import StorageError
from synthrep_shared.samples import caption_id
from synthrep_shared.storage import DatasetPaths


def encoded(number: int, image_format: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, image_format)
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageFolder of two classes."""
    for number in range(5):
        file = tmp_path / "tree" / ("wren", "song thrush")[number % 2] / f"{number}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number))
    (tmp_path / "tree" / "notes.md").write_text("no image")
    return tmp_path / "tree"


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    return DatasetPaths(tmp_path / "data", "birds")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def stored(paths: DatasetPaths) -> dict[str, tuple[str, bytes]]:
    """Caption and bytes of every image, by its name in the shard."""
    found = {}
    for record in read_log(paths.log):
        if record.kind == "shard":
            with tarfile.open(paths.shards / record.name) as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar}
            for name, data in files.items():
                if not name.endswith("json"):
                    text = json.loads(files[name.rpartition(".")[0] + ".json"])
                    found[name] = text["caption"], data
    return found


def report_of(paths: DatasetPaths):
    return verify_dataset(paths, now_s=0.0, min_age_s=0.0)


def test_a_tree_becomes_a_data_set_that_verifies(tree, paths):
    report = import_images(find_images(tree), paths)
    assert (report.images, report.imported, report.refused, report.earlier) == (5, 5, 0, 0)
    audit = report_of(paths)
    assert audit.is_clean, audit
    assert (audit.accepted, audit.committed, audit.undecided, audit.images) == (5, 5, 0, 5)
    images = stored(paths)
    assert sorted(caption for caption, _ in images.values()) == ["song thrush"] * 2 + ["wren"] * 3
    assert {data for _, data in images.values()} == {encoded(number) for number in range(5)}
    refs = [group for record in read_log(paths.log) for group in record.groups]
    assert {group.caption_id for group in refs} == {caption_id("wren"), caption_id("song thrush")}
    assert not is_paused(paths, report.batch)


def test_each_image_can_be_a_caption_of_its_own(tree, paths):
    import_images(find_images(tree, caption_by="file"), paths)
    captions = {caption for caption, _ in stored(paths).values()}
    assert captions == {f"wren/{k}" for k in (0, 2, 4)} | {f"song thrush/{k}" for k in (1, 3)}


def test_tars_are_read_with_their_captions(tmp_path, paths):
    folder = tmp_path / "tars"
    write_tar(
        folder / "00.tar",
        {
            "a/1.jpg": encoded(1), "a/1.txt": b" a  red wren\n", "a/2.png": encoded(2, "PNG"),
            "a/2.json": b'{"caption": "a wren"}', "b/2.webp": encoded(3, "WEBP"), "b/2.cls": b"1",
            "3.v.jpg": encoded(4), "README": b"no image",
        },
    )  # fmt: skip
    write_tar(folder / "sub" / "01.tar", {"1.JPG": encoded(5), "1.cls": b"7", "2.jpg": encoded(6)})
    (folder / "classes.txt").write_text("tit\ncrow\n")
    assert import_images(find_images(folder), paths).imported == 5
    found = dict(stored(paths).values())
    assert found == {
        "a red wren": encoded(1), "a wren": encoded(2, "PNG"), "crow": encoded(3, "WEBP"),
        "class 7": encoded(5), "sub/01.tar/2": encoded(6),
    }  # fmt: skip
    assert report_of(paths).is_clean


def test_other_formats_become_png_and_what_is_no_image_is_a_failure(tmp_path, paths):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.bmp").write_bytes(encoded(1, "BMP"))
    (tree / "b.jpg").write_bytes(encoded(2, "JPEG", "CMYK"))
    (tree / "c.jpg").write_bytes(encoded(3)[:-40])
    (tree / "d.png").write_bytes(b"<html>")
    (tree / "e.jpg").write_bytes(encoded(4, "PNG"))
    report = import_images(find_images(tree), paths)
    assert (report.imported, report.refused) == (3, 2)
    images = stored(paths)
    assert {name.rpartition(".")[2] for name in images} == {"png"}
    assert {caption for caption, _ in images.values()} == {"a", "b", "e"}
    audit = report_of(paths)
    assert audit.is_clean, audit
    assert (audit.committed, audit.failed) == (3, 2)


def test_what_is_too_large_is_refused(tree, paths, monkeypatch):
    monkeypatch.setattr(importer, "_MAX_PIXELS", 10)
    assert import_images(find_images(tree), paths).refused == 5


def test_a_second_import_changes_nothing(tree, paths):
    first = import_images(find_images(tree), paths)
    log = paths.log.read_bytes()
    again = import_images(find_images(tree), paths)
    assert (again.batch, again.imported, again.earlier) == (first.batch, 0, 5)
    assert paths.log.read_bytes() == log


def test_an_import_that_was_killed_goes_on(tree, paths, monkeypatch):
    monkeypatch.setattr(importer, "_SHARD_IMAGES", 2)
    images = find_images(tree)
    counts = []

    def advance(count):
        counts.append(count)
        if sum(counts) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_images(images, paths, advance=advance)
    (batch,) = list_batches(paths)
    assert is_paused(paths, batch)  # nobody generates what is left
    assert report_of(paths).is_sound
    report = import_images(images, paths)
    assert (report.imported, report.earlier) == (3, 2)
    assert not is_paused(paths, batch)
    assert report_of(paths).is_clean
    assert len(stored(paths)) == 5


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(StorageError, match="no images"):
        find_images(tmp_path)
    with pytest.raises(StorageError, match="no folder"):
        find_images(tmp_path / "absent")
    (tmp_path / "x.tar").write_bytes(encoded(1))
    with pytest.raises(StorageError, match="damaged"):
        find_images(tmp_path)
