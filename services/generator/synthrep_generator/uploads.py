"""Prompts out of an uploaded text, CSV, TSV or NDJSON stream, in constant memory.

A line that holds no prompt is left out, counted and, among the first, named with its reason; a
stream that is not what it claims to be, or holds more than the limits, is refused whole.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from synthrep_generator.admission import spool_line
from synthrep_generator.errors import UploadError, UploadTooLargeError
from synthrep_shared.messages import Prompt, RejectedLine, RejectedLines

MAX_LINES = 1_000_000
MAX_BYTES = 1 << 30
MAX_LINE_BYTES = 64 << 10
_MAX_SHOWN = 100
_COLUMNS = ("caption", "prompt")
_BOM = b"\xef\xbb\xbf"
_PROMPT: TypeAdapter[str] = TypeAdapter(Prompt)

Candidate = tuple[int, str]
"""A line's number, from 1, and the text that may be a prompt."""


@dataclass(frozen=True)
class Summary:
    """What an upload held: prompts, their `digest_prompts`, and the lines that were left out."""

    num_prompts: int
    prompts_digest: str
    rejected: RejectedLines


class _Rejects:
    """Counts the lines that are left out and keeps the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[RejectedLine] = []

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < _MAX_SHOWN:
            self.first.append(RejectedLine(line=line, reason=reason))


class _Source(Protocol):
    def readline(self, size: int, /) -> bytes: ...


class _Lines:
    """The physical lines with their ends, but for those too long to hold a prompt."""

    def __init__(
        self, stream: _Source, rejects: _Rejects, *, max_lines: int, max_bytes: int
    ) -> None:
        self.number = 0
        self.rejects = rejects
        self._stream = stream
        self._max_lines = max_lines
        self._bytes_left = max_bytes

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._read():
            self.number += 1
            if self.number > self._max_lines:
                raise UploadTooLargeError(f"an upload may hold {self._max_lines} lines")
            line = piece.removeprefix(_BOM) if self.number == 1 else piece
            is_whole = len(piece) < MAX_LINE_BYTES or piece.endswith(b"\n")
            while not is_whole:
                piece = self._read()
                is_whole = len(piece) < MAX_LINE_BYTES or piece.endswith(b"\n")
                line = b""
            if line:
                yield line
            else:
                self.rejects.add(self.number, f"longer than {MAX_LINE_BYTES} bytes")

    def _read(self) -> bytes:
        piece = self._stream.readline(MAX_LINE_BYTES)
        self._bytes_left -= len(piece)
        if self._bytes_left < 0:
            raise UploadTooLargeError("an upload may hold 1 GiB, unpacked")
        return piece


def spool_prompts(
    raw: IO[bytes],
    spool: IO[bytes],
    *,
    media_type: str,
    is_gzip: bool,
    max_lines: int = MAX_LINES,
    max_bytes: int = MAX_BYTES,
) -> Summary:
    """Write the prompts of `raw` to `spool`, one JSON string a line.

    `media_type` is a key of `FORMATS`. Raises UploadError for a stream that cannot be unpacked and
    UploadTooLargeError for one of more than `max_lines` lines or `max_bytes` bytes unpacked.
    """
    rejects, digest, num_prompts = _Rejects(), hashlib.sha256(), 0
    stream: _Source = gzip.GzipFile(fileobj=raw) if is_gzip else raw
    lines = _Lines(stream, rejects, max_lines=max_lines, max_bytes=max_bytes)
    try:
        for number, text in FORMATS[media_type](lines):
            try:
                line = spool_line(_PROMPT.validate_python(text, strict=True))
            except ValidationError as error:
                message = error.errors(include_url=False, include_input=False)[0]["msg"]
                rejects.add(number, message.removeprefix("Value error, "))
                continue
            spool.write(line)
            digest.update(line)
            num_prompts += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UploadError("the body is not a complete gzip stream") from error
    rejected = RejectedLines(count=rejects.count, first=rejects.first)
    return Summary(num_prompts, digest.hexdigest(), rejected)


def read_spool(spool: IO[bytes]) -> Iterator[str]:
    """The prompts of a spool, from its start."""
    spool.seek(0)
    for line in spool:
        yield json.loads(line)


def _read_text(lines: _Lines) -> Iterator[Candidate]:
    """A prompt a line."""
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError:
            lines.rejects.add(lines.number, "not UTF-8")
            continue
        if text.isspace():
            lines.rejects.add(lines.number, "blank line")
        else:
            yield lines.number, text.rstrip("\r\n")  # a line end would slow the check of the text


def _read_ndjson(lines: _Lines) -> Iterator[Candidate]:
    """A JSON string a line, or an object with one under `caption` or `prompt`."""
    for number, text in _read_text(lines):
        try:
            value = from_json(text)
        except ValueError:
            lines.rejects.add(number, "not JSON")
            continue
        if isinstance(value, dict):
            value = next((value[name] for name in _COLUMNS if name in value), None)
        if isinstance(value, str):
            yield number, value
        else:
            lines.rejects.add(number, "neither a string nor an object with a caption or prompt")


def _read_csv(lines: _Lines) -> Iterator[Candidate]:
    """RFC 4180; a quoted field may go over several lines."""
    yield from _pick_column(_csv_rows(lines), lines.rejects)


def _csv_rows(lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    # What is no UTF-8 becomes surrogates here, which no prompt may hold.
    rows = csv.reader((line.decode(errors="surrogateescape") for line in lines), strict=True)
    while True:
        number = lines.number + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.rejects.add(number, f"malformed CSV: {error}")
            continue
        if row:
            yield number, row
        else:
            lines.rejects.add(number, "blank line")


def _read_tsv(lines: _Lines) -> Iterator[Candidate]:
    """Cells between tabs, a row a line; quotes around a whole cell are taken off."""
    rows = ((number, text.rstrip("\r\n").split("\t")) for number, text in _read_text(lines))
    yield from _pick_column(
        ((number, [_unquote(cell) for cell in cells]) for number, cells in rows), lines.rejects
    )


def _unquote(cell: str) -> str:
    if len(cell) > 1 and cell.startswith('"') and cell.endswith('"'):
        return cell[1:-1].replace('""', '"')
    return cell


def _pick_column(rows: Iterator[tuple[int, list[str]]], rejects: _Rejects) -> Iterator[Candidate]:
    """The column that the first row calls `caption` or `prompt`; else the first, from that row."""
    column: int | None = None
    for number, cells in rows:
        if column is None:
            names = [cell.strip().lower() for cell in cells]
            column = next((names.index(name) for name in _COLUMNS if name in names), None)
            if column is not None:
                continue
            column = 0
        if column < len(cells):
            yield number, cells[column]
        else:
            rejects.add(number, "too few columns")


FORMATS: dict[str, Callable[[_Lines], Iterator[Candidate]]] = {
    "text/plain": _read_text,
    "text/csv": _read_csv,
    "text/tab-separated-values": _read_tsv,
    "application/x-ndjson": _read_ndjson,
}
