import pytest

from synthrep_shared.errors import StorageError
from synthrep_shared.storage import DatasetPaths, list_datasets, publish_bytes


@pytest.mark.parametrize("name", ["..", "a/b", "", "A", "a" * 65, ".hidden", "a\x00", "a\n"])
def test_dataset_names_cannot_leave_the_root(tmp_path, name):
    with pytest.raises(StorageError):
        DatasetPaths(tmp_path, name)


def test_first_writer_wins_and_leaves_no_temporary_file(tmp_path):
    assert publish_bytes(b"one", tmp_path / "f")
    assert not publish_bytes(b"two", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_replacing_is_explicit(tmp_path):
    publish_bytes(b"one", tmp_path / "f")
    assert publish_bytes(b"two", tmp_path / "f", replace=True)
    assert (tmp_path / "f").read_bytes() == b"two"


def test_datasets_are_the_folders_with_a_valid_name(tmp_path):
    DatasetPaths(tmp_path, "pets").make_folders()
    (tmp_path / "Not A Dataset").mkdir()
    assert list_datasets(tmp_path) == ["pets"]
    assert list_datasets(tmp_path / "absent") == []
