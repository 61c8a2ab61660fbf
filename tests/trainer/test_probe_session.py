"""The test part stays shut until the choices are recorded."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from synthrep_trainer.probe_data import ProbeDataError, ProbeDataset
from synthrep_trainer.probe_session import ProbeSession, TestIsSealedError, validation_mask


@pytest.fixture
def dataset(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name, data in (("a.png", stream.getvalue()), ("a.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return ProbeDataset("x", tmp_path)


def test_the_test_part_is_sealed_until_choices_are_recorded(dataset):
    session = ProbeSession(dataset)
    with pytest.raises(TestIsSealedError, match="record the choices"):
        session.test_batches(image_px=4)
    session.record({"trained": 1.0})
    assert next(session.test_batches(image_px=4)).labels.tolist() == [1]


def test_the_test_part_does_not_pass_as_a_fitting_part(dataset):
    with pytest.raises(TestIsSealedError, match="not for fitting"):
        ProbeSession(dataset).fitting_batches("test", image_px=4)


def test_choices_are_recorded_once(dataset):
    session = ProbeSession(dataset)
    session.record({"trained": 1.0})
    with pytest.raises(TestIsSealedError, match="recorded before"):
        session.record({"trained": 2.0})


def test_empty_choices_do_not_open_the_test_part(dataset):
    session = ProbeSession(dataset)
    with pytest.raises(ValueError, match="at least one"):
        session.record({})
    with pytest.raises(TestIsSealedError):
        session.test_batches(image_px=4)


def test_choices_that_could_not_be_stored_do_not_open_the_test_part(dataset):
    def fail(choices):
        raise OSError("disk full")

    session = ProbeSession(dataset)
    with pytest.raises(OSError, match="disk full"):
        session.record({"trained": 1.0}, store=fail)
    with pytest.raises(TestIsSealedError):
        session.test_batches(image_px=4)


def test_choices_are_stored_before_the_test_part_opens(dataset):
    session, stored = ProbeSession(dataset), []
    session.record({"trained": 1.0}, store=stored.append)
    assert stored == [{"trained": 1.0}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_session_needs_train_and_test(dataset, split):
    dataset.path(split).unlink()
    with pytest.raises(ProbeDataError, match="is missing"):
        ProbeSession(dataset)


def test_a_validation_part_is_a_fitting_part_where_there_is_one(dataset):
    assert ProbeSession(dataset).fitting_splits == ("train",)
    dataset.path("test").with_name("val.tar").touch()
    assert ProbeSession(dataset).fitting_splits == ("train", "val")


def test_validation_takes_a_fifth_of_each_class():
    labels = np.repeat([0, 1, 2, 5, 7], [100, 10, 3, 2, 1])
    mask = validation_mask(labels, seed=0)
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2, 5, 7)] == [20, 2, 1, 1, 0]


def test_validation_rows_follow_the_seed():
    labels = np.repeat([0, 1], 50)
    first, again, other = (validation_mask(labels, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
