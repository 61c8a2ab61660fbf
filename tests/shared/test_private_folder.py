"""Folders below `/tmp` are ours alone, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from synthrep_shared.errors import StorageError
from synthrep_shared.object_store import ObjectPath
from synthrep_shared.private_folder import make_private_folder
from synthrep_shared.storage import spool_folder


def test_a_folder_is_made_once_and_private(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "a")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_private_folder(folder) == folder


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    with pytest.raises(StorageError, match="not a folder of user"):
        make_private_folder(tmp_path / "a")


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        make_private_folder(tmp_path / "a")


def test_a_link_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "a").symlink_to(tmp_path / "own")
    with pytest.raises(StorageError, match="not a folder of user"):
        make_private_folder(tmp_path / "a")


def test_files_in_the_making_of_a_store_are_in_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = ObjectPath.from_url("s3://bucket/prefix")
    assert [p.stat().st_mode & 0o777 for p in spool_folder(root).parents[:1]] == [0o700]
    spool_folder(root).parent.chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        spool_folder(root)


def test_the_folders_above_are_made_too(tmp_path: Path) -> None:
    assert make_private_folder(tmp_path / "absent" / "a").is_dir()
