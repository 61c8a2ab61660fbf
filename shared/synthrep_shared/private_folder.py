"""Folders in places that others may write to, such as `/tmp`: this user's alone, or refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from synthrep_shared.errors import StorageError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(path: Path) -> Path:
    """Make the folder, and those above it, where they are absent, and return it.

    Raises StorageError if what is there is a link, somebody else's, or writable by others: they
    could put their files in the place of ours.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StorageError(f"{path} is not a folder of user {os.getuid()}; remove it")
    if found.st_mode & _OTHERS_WRITE:
        raise StorageError(f"others may write to {path}; take that right from them, or remove it")
    return path
