"""The disk that the data lies on: where this user may mount one, a small tmpfs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path


class Disk:
    """A folder for the data; `is_small` says if `fill` can be used."""

    def __init__(self, folder: Path, *, size_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
        try:
            self.is_small = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.is_small = False

    def fill(self, *, left_bytes: int) -> None:
        """Take all space but `left_bytes`, or nearly so: others write at the same time."""
        descriptor = os.open(self._filler, os.O_CREAT | os.O_WRONLY)
        size = 0
        step = self._free_bytes() - left_bytes
        while step > 0:
            try:
                os.posix_fallocate(descriptor, size, step)
                size += step
                step = self._free_bytes() - left_bytes
            except OSError:
                step //= 2
        os.close(descriptor)

    def empty(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount; what was on it is gone."""
        if self.is_small:
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["umount", "--lazy", str(self.folder)], check=False)

    @property
    def _filler(self) -> Path:
        return self.folder / ".filler"

    def _free_bytes(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize
