"""A bounded folder of features."""

from __future__ import annotations

import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from synthrep_trainer.feature_cache import FeatureCache, cache_key


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache", max_bytes=10_000)


def keep(cache, key, *, rows=10, seed=0, classes=()):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 7)).astype(np.float32)
    labels = rng.integers(-1, 9, (rows, *classes))
    with cache.writer(key) as writer:
        for part in np.array_split(np.arange(rows), 3):
            writer.add(features[part], labels[part])
    return features, labels


def fill(cache, *widths):
    with cache.writer("a") as writer:
        for width in widths:
            writer.add(np.zeros((2, width), np.float32), np.zeros(2, np.int64))


@pytest.mark.parametrize("classes", [(), (4,)])
def test_features_come_back_as_they_went(cache, tmp_path, classes):
    features, labels = keep(cache, "a", classes=classes)
    found = cache.features("a")
    np.testing.assert_array_equal(found[0], features)
    np.testing.assert_array_equal(found[1], labels)
    assert found[0].dtype == np.float32
    file = load_file(tmp_path / "cache" / "a.safetensors")  # any reader of the format will do
    np.testing.assert_array_equal(file["features"], features)


def test_features_are_mapped_and_not_read(cache):
    keep(cache, "a", rows=50)
    first, _ = cache.features("a")
    with open("/proc/self/maps") as maps:
        assert any(line.rstrip().endswith("a.safetensors") for line in maps)
    assert len(first) == 50


def test_what_is_not_there_is_none(cache):
    assert cache.features("a") is None
    assert cache.note("a") is None


def test_what_was_used_longest_ago_leaves_first(cache, tmp_path):
    for age, key in enumerate("abc"):
        keep(cache, key, rows=80)  # 3,072 bytes
        os.utime(tmp_path / "cache" / f"{key}.safetensors", (age, age))
    assert cache.features("a") is not None  # and so it is the newest
    keep(cache, "d", rows=80)
    assert [key for key in "abcd" if cache.features(key) is None] == ["b"]


def test_features_that_left_stay_readable_for_who_has_them(cache):
    features, _ = keep(cache, "a", rows=400)  # more than the bound
    assert cache.features("a") is None
    with cache.writer("b") as writer:
        writer.add(features, np.zeros(400, np.int64))
    np.testing.assert_array_equal(writer.result[0], features)


def test_an_interrupted_writer_leaves_nothing(cache, tmp_path):
    with pytest.raises(ValueError, match="expected features"):
        fill(cache, 3, 4)
    assert list((tmp_path / "cache").iterdir()) == []


def test_leftovers_of_a_process_that_died_are_cleared(cache, tmp_path):
    keep(cache, "a")
    old, new = tmp_path / "cache" / ".x.1.part", tmp_path / "cache" / ".y.2.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    keep(cache, "b")
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 600])
def test_a_damaged_file_is_dropped(cache, tmp_path, damage):
    keep(cache, "a")
    path = tmp_path / "cache" / "a.safetensors"
    path.write_bytes(damage)
    assert cache.features("a") is None
    assert not path.exists()


def test_a_file_without_rows_is_refused(cache):
    with pytest.raises(ValueError, match="no features"), cache.writer("a"):
        pass


def test_notes_are_kept(cache, tmp_path):
    cache.keep_note("n", {"value": 0.5})
    assert cache.note("n") == {"value": 0.5}
    (tmp_path / "cache" / "n.json").write_text("{")
    assert cache.note("n") is None


def test_keys_tell_everything_apart():
    keys = {cache_key("a", 1), cache_key("a", 2), cache_key("a1"), cache_key("a", [1])}
    assert len(keys) == 4
    assert cache_key({"x": 1, "y": 2}) == cache_key({"y": 2, "x": 1})
