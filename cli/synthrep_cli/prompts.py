"""Captions from a file: text lines, csv, tsv or ndjson, gzip or not, or standard input."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

from synthrep_shared.errors import SynthRepError

_COLUMNS = ("caption", "prompt")


def read(file: str) -> list[str]:
    """The captions, in order, blank ones left out; the format follows the file's name.

    CSV and TSV: the column `caption` or `prompt`, else the first. NDJSON: strings, or objects with
    one of these keys. Raises SynthRepError for a file that cannot be read.
    """
    try:
        if file == "-":
            data, name = sys.stdin.buffer.read(), "stdin.txt"
        else:
            path = Path(file)
            data, name = path.read_bytes(), path.name
            if name.endswith(".gz"):
                data, name = gzip.decompress(data), name[: -len(".gz")]
        lines = data.decode("utf-8-sig").splitlines()
        suffix = Path(name).suffix.lower()
        if suffix in (".csv", ".tsv"):
            captions = _from_table(lines, "," if suffix == ".csv" else "\t")
        elif suffix in (".ndjson", ".jsonl"):
            captions = [_from_json(line) for line in lines if line.strip()]
        else:
            captions = lines
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise SynthRepError(f"cannot read captions from {file}: {error}") from error
    return [c.strip() for c in captions if c.strip()]


def _from_table(lines: list[str], delimiter: str) -> list[str]:
    rows = list(csv.reader(lines, delimiter=delimiter))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    for name in _COLUMNS:
        if name in header:
            column = header.index(name)
            return [row[column] for row in rows[1:] if len(row) > column]
    return [row[0] for row in rows if row]


def _from_json(line: str) -> str:
    value = json.loads(line)
    if isinstance(value, dict):
        value = next((value[k] for k in _COLUMNS if k in value), None)
    if not isinstance(value, str):
        raise ValueError(f"expected a string or an object with a caption, got {line[:60]!r}")
    return value
