"""Captions come out of files as the generator's upload route reads them."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from synthrep_cli.prompts import read
from synthrep_generator.uploads import read_spool, spool_prompts
from synthrep_shared.errors import SynthRepError

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file and gives its path."""

    def make(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return make


CASES = {
    "a.txt": ("a robin\n\n  a wren \r\na\u2028crow", ["a robin", "a wren", "a\u2028crow"]),
    "b.csv": ('id,Caption\n1,a robin\n2,"a wren, asleep"\n', ["a robin", "a wren, asleep"]),
    "c.csv": ('prompt,n\n"two\nlines",1\n"a ""red"" robin",2\n', ["two\nlines", 'a "red" robin']),
    "d.csv": ("a robin,1\na wren,2\n", ["a robin", "a wren"]),
    "e.tsv": (
        'caption\tcount\na robin\t3\n"a wren"\t1\n"open\t2\n',
        ["a robin", "a wren", '"open'],
    ),
    "f.ndjson": (
        '"a robin"\n\n{"caption": "a wren"}\n{"prompt": "a crow"}\n',
        ["a robin", "a wren", "a crow"],
    ),
    "g.jsonl": ('{"prompt": "no", "caption": "a robin"}', ["a robin"]),
    "h": ("a robin\na wren", ["a robin", "a wren"]),
    "i.txt": ("", []),
    "j.csv": ("\n\ncaption\na robin\n", ["a robin"]),
}
MEDIA_TYPES = {
    ".txt": "text/plain", ".csv": "text/csv", ".tsv": "text/tab-separated-values",
    ".ndjson": "application/x-ndjson", ".jsonl": "application/x-ndjson", "": "text/plain",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_captions_come_in_order(write, name, is_packed):
    text, expected = CASES[name]
    data = text.encode()
    path = write(f"{name}.gz", gzip.compress(data)) if is_packed else write(name, data)
    assert read(path) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_upload_route_finds_the_same_captions(write, name):
    data, spool = CASES[name][0].encode(), io.BytesIO()
    media_type = MEDIA_TYPES[Path(name).suffix]
    spool_prompts(io.BytesIO(data), spool, media_type=media_type, is_gzip=False)
    found = [" ".join(caption.split()) for caption in read(write(name, data))]
    assert found == list(read_spool(spool))


def test_a_byte_order_mark_is_no_part_of_a_caption(write):
    assert read(write("a.csv", "\ufeffcaption\na robin".encode())) == ["a robin"]


def test_standard_input_is_text_packed_or_not(monkeypatch):
    for data in (b"a robin\na wren\n", gzip.compress(b"a robin\na wren\n")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read("-") == ["a robin", "a wren"]


PACKED = gzip.compress(json.dumps(list(range(1000))).encode())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("latin.txt", "a caf\xe9".encode("latin-1")),
        ("cut.txt.gz", PACKED[:-20]),
        ("damaged.txt.gz", PACKED[:40] + b"\xff" * 40 + PACKED[80:]),
        ("list.ndjson", b'["a robin"]\n'),
        ("number.ndjson", b'{"caption": 7}\n'),
        ("broken.ndjson", b'{"caption": \n'),
        ("open.csv", b'caption\n"a robin\n'),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_sentence(write, name, data):
    with pytest.raises(SynthRepError, match=f"cannot read captions from .*{name}: .") as raised:
        read(write(name, data))
    assert "\n" not in str(raised.value).strip()


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(SynthRepError, match="absent.txt"):
        read("absent.txt")
