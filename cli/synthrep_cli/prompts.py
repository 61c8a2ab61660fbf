"""Captions from a file: text lines, csv, tsv or ndjson, gzip or not, or standard input."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path

from synthrep_shared.errors import SynthRepError

_COLUMNS = ("caption", "prompt")
_GZIP = b"\x1f\x8b"


def read(file: str) -> list[str]:
    """The captions, in order, blank ones left out; the format follows the file's name.

    CSV and TSV: the column `caption` or `prompt`, else the first. NDJSON: strings, or objects with
    one of these keys. Standard input is text. Raises SynthRepError for a file that cannot be read.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode("utf-8-sig")
        captions = _from_text(text, Path(file.removesuffix(".gz")).suffix.lower())
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise SynthRepError(f"cannot read captions from {file}: {error}") from error
    return [caption.strip() for caption in captions if caption.strip()]


def _from_text(text: str, suffix: str) -> list[str]:
    lines = text.split("\n")
    if suffix == ".csv":
        return _pick_column(list(csv.reader(io.StringIO(text), strict=True)))
    if suffix == ".tsv":
        return _pick_column([[_unquote(c) for c in line.strip("\r").split("\t")] for line in lines])
    if suffix in (".ndjson", ".jsonl"):
        return [_from_json(line) for line in lines if line.strip()]
    return lines


def _pick_column(table: list[list[str]]) -> list[str]:
    rows = [row for row in table if any(row)]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in _COLUMNS if name in header), None)
    if column is None:
        return [row[0] for row in rows]
    return [row[column] for row in rows[1:] if len(row) > column]


def _unquote(cell: str) -> str:
    if len(cell) > 1 and cell.startswith('"') and cell.endswith('"'):
        return cell[1:-1].replace('""', '"')
    return cell


def _from_json(line: str) -> str:
    value = json.loads(line)
    if isinstance(value, dict):
        value = next((value[k] for k in _COLUMNS if k in value), None)
    if not isinstance(value, str):
        raise ValueError(f"expected a string or an object with a caption, got {line[:60]!r}")
    return value
