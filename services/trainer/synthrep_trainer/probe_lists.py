"""The lists that come with published sets, as text or MATLAB files. They are not trusted.

Whatever is wrong with one becomes a ProbeDataError that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import scipy.io

from synthrep_trainer.probe_data import ProbeDataError

MAX_LIST_BYTES = 256 * 2**20


def lines(path: Path) -> Iterator[str]:
    """The lines of a list that are not blank."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ProbeDataError(f"{path}: a list of more than {MAX_LIST_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeDataError(f"{path}: {error}") from error
    yield from (line.strip() for line in lines if line.strip())


def class_indices(names: Iterable[str]) -> dict[str, int]:
    """The index of each class name."""
    return {name: index for index, name in enumerate(names)}


def index_of(indices: Mapping[str, int], name: str, where: Path) -> int:
    """The index of a name that a list at `where` gives; raises ProbeDataError for another one."""
    try:
        return indices[name]
    except KeyError:
        raise ProbeDataError(f"{where}: {name!r} is no class of this set") from None


def matrix(path: Path, name: str) -> np.ndarray:
    """One array, of at least one axis, of a MATLAB file, which holds data and no code."""
    try:
        return np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[name])
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ProbeDataError(f"{path}: the MATLAB file cannot be read: {error}") from error
    except KeyError:
        raise ProbeDataError(f"{path} holds no {name!r}") from None


def fields(line: str, count: int, where: Path) -> list[str]:
    """A line split at white space; the last field keeps its own."""
    found = line.split(None, count - 1)
    if len(found) != count:
        raise ProbeDataError(f"{where}: expected {count} fields, found {line[:80]!r}")
    return found


def number(text: object, where: Path) -> int:
    """The whole number in a list at `where`."""
    try:
        return int(str(text))
    except ValueError:
        raise ProbeDataError(f"{where}: expected a number, found {text!r}") from None
