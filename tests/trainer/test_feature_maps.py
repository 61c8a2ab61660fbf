"""A run's map is read as it was written, and tells the neighbours of a group."""

from __future__ import annotations

import os

import pytest

from synthrep_shared.storage import temporary_path
from synthrep_trainer.feature_maps import (
    FeatureMap,
    MappedGroup,
    MappedImage,
    read_feature_map,
    write_feature_map,
)


def mapped(group: int, image: int, *nearest: tuple[int, float]) -> MappedImage:
    return MappedImage(group=group, image=image, x=0.0, y=0.0, nearest=nearest)


def three_groups(step: int = 7) -> FeatureMap:
    """Group aa has two images, bb and cc one each."""
    return FeatureMap(
        dataset="birds",
        step=step,
        checkpoint="5a",
        shares=(0.5, 0.25),
        neighbour_accuracy=0.5,
        groups=tuple(
            MappedGroup(gid=2 * name, caption=f"a {name}", is_held_out=False) for name in "abc"
        ),
        images=(
            mapped(0, 0, (3, 0.5), (2, 0.4)),
            mapped(0, 1, (2, 0.9), (3, 0.1)),
            mapped(1, 0, (1, 0.9), (3, 0.2)),
            mapped(2, 0, (0, 0.5), (2, 0.2)),
        ),
    )


def test_a_map_is_read_as_it_was_written(tmp_path):
    assert read_feature_map(tmp_path) is None
    write_feature_map(tmp_path, three_groups())
    assert read_feature_map(tmp_path) == three_groups()


def test_a_map_that_was_replaced_is_read_anew(tmp_path):
    for step in (7, 8):
        write_feature_map(tmp_path, three_groups(step))
        found = read_feature_map(tmp_path)
        assert found is not None
        assert found.step == step


def test_what_a_killed_process_left_half_written_goes_after_a_day(tmp_path):
    left, young = (temporary_path(tmp_path, "map.json") for _ in range(2))
    others = [temporary_path(tmp_path, "status.json"), tmp_path / "metrics.jsonl"]
    for path in (left, young, *others):
        path.touch()
    for path in (left, *others):
        os.utime(path, (1e9, 1e9))
    write_feature_map(tmp_path, three_groups())
    assert set(tmp_path.iterdir()) == {young, *others, tmp_path / "map.json"}


def test_a_map_of_another_version_or_damaged_is_none(tmp_path):
    write_feature_map(tmp_path, three_groups().model_copy(update={"version": 9}))
    assert read_feature_map(tmp_path) is None
    write_feature_map(tmp_path, three_groups())
    whole = (tmp_path / "map.json").read_bytes()
    (tmp_path / "half.json").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.json").replace(tmp_path / "map.json")
    assert read_feature_map(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": ()},
        {"images": (mapped(3, 0),)},
        {"images": (mapped(-1, 0),)},
        {"images": (mapped(0, 0, (1, 0.5)),)},
    ],
)
def test_a_map_that_points_beyond_itself_is_none(tmp_path, wrong):
    write_feature_map(tmp_path, three_groups().model_copy(update=wrong))
    assert read_feature_map(tmp_path) is None


def test_a_file_larger_than_any_map_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("synthrep_trainer.feature_maps._MAX_BYTES", 100)
    write_feature_map(tmp_path, three_groups())
    assert read_feature_map(tmp_path) is None


def test_neighbours_are_the_nearest_to_any_image_of_the_group():
    found = three_groups().neighbours("aa", 8)
    assert [(n.group.gid, n.image, n.cosine) for n in found] == [("bb", 0, 0.9), ("cc", 0, 0.5)]
    assert len(three_groups().neighbours("aa", 1)) == 1


def test_a_group_off_the_map_has_no_neighbours():
    assert three_groups().neighbours("dd", 8) == []
