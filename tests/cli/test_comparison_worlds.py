"""Real images come from photos where there are some, else from train parts that travel."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from synthrep_cli.comparison_config import ComparisonError, RealWorld
from synthrep_cli.comparison_worlds import import_real, real_name, real_source
from synthrep_generator.verify import verify_dataset
from synthrep_shared.storage import DatasetPaths


def write_archive(folder, names=("000-1.jpg", "001-2.jpg", "001-3.jpg")):
    (folder / "generator").mkdir(parents=True)
    with tarfile.open(folder / "generator" / "birds.tar.xz", "w:xz") as tar:
        for number, name in enumerate(names):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (40 * number, 0, 9)).save(stream, "JPEG")
            info = tarfile.TarInfo(name)
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    (folder / "generator" / "birds.classes.txt").write_text("wren\nsong thrush\n")


WORLD = RealWorld(
    archive="generator/birds.tar.xz", max_images=30, probe_sets=("digits",), templates=("one {}",)
)


def captions(paths):
    found = []
    for shard in paths.shards.iterdir():
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(m))["caption"] for m in tar if "json" in m.name]
    return sorted(found)


def test_photos_become_a_data_set_with_the_classes_in_their_captions(tmp_path):
    write_archive(tmp_path)
    source = real_source(WORLD, str(tmp_path))
    assert source.kind == "photos"
    paths = DatasetPaths(tmp_path / "data", "real")
    assert import_real(WORLD, source, paths, tmp_path / "scratch") == 3
    assert captions(paths) == ["one song thrush", "one song thrush", "one wren"]
    assert verify_dataset(paths, now_s=0.0, min_age_s=0.0).is_clean
    assert not (tmp_path / "scratch").exists()
    assert import_real(WORLD, source, paths, tmp_path / "scratch") == 3
    assert len(captions(paths)) == 3


def test_without_a_folder_the_train_parts_that_travel_are_taken_evenly(tmp_path):
    source = real_source(WORLD, None)
    assert source.kind == "drawings"
    assert {path.name for _, path, _, _ in source.tars} == {"train.tar.xz"}
    paths = DatasetPaths(tmp_path / "data", "real")
    assert import_real(WORLD, source, paths, tmp_path / "scratch") == 30
    assert len({*captions(paths)}) > 5
    assert real_name(WORLD, source) != real_name(WORLD.model_copy(update={"max_images": 9}), source)


def test_an_image_of_no_class_is_named(tmp_path):
    write_archive(tmp_path, names=("007-1.jpg",))
    source = real_source(WORLD, str(tmp_path))
    with pytest.raises(ComparisonError, match=r"007-1\.jpg is of no class"):
        import_real(WORLD, source, DatasetPaths(tmp_path / "data", "real"), tmp_path / "scratch")
