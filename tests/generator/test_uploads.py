from __future__ import annotations

import gzip
import io
import json
import tempfile
import tracemalloc
from contextlib import contextmanager

import pytest

from synthrep_generator.admission import digest_prompts
from synthrep_generator.errors import UploadError, UploadTooLargeError
from synthrep_generator.uploads import MAX_LINE_BYTES, read_spool, spool_prompts

TEXT, CSV = "text/plain", "text/csv"
TSV, NDJSON = "text/tab-separated-values", "application/x-ndjson"


def read(data: bytes, media_type: str = TEXT, **options):
    """(prompts, [(line, reason)]) of an upload."""
    spool = io.BytesIO()
    options.setdefault("is_gzip", False)
    summary = spool_prompts(io.BytesIO(data), spool, media_type=media_type, **options)
    prompts = list(read_spool(spool))
    assert summary.num_prompts == len(prompts)
    assert summary.prompts_digest == digest_prompts(prompts)
    rejected = summary.rejected
    assert rejected.count >= len(rejected.first)
    return prompts, [(line.line, line.reason) for line in rejected.first]


@contextmanager
def bounded_memory(limit_bytes: int = 4 << 20):
    """Fails if what runs inside holds more at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


def test_text_is_a_prompt_a_line_in_any_line_ending():
    assert read(b"a dog\na  red\tcat\r\nlast") == (["a dog", "a red cat", "last"], [])


def test_byte_order_mark_is_no_part_of_the_first_prompt():
    assert read(b"\xef\xbb\xbfa dog\n") == (["a dog"], [])
    assert read(b"\xef\xbb\xbfcaption\na dog\n", CSV) == (["a dog"], [])


def test_bad_lines_are_counted_and_the_good_ones_kept():
    prompts, rejected = read(b"good\n\n \t\n\xff\xfe\na\0b\n" + b"x" * 1001 + b"\nfine")
    assert prompts == ["good", "fine"]
    assert [line for line, _ in rejected] == [2, 3, 4, 5, 6]
    reasons = [reason for _, reason in rejected]
    assert reasons[:3] == ["blank line", "blank line", "not UTF-8"]
    assert "control" in reasons[3]
    assert "1000 characters" in reasons[4]


def test_only_the_first_hundred_bad_lines_are_named():
    spool = io.BytesIO()
    data = io.BytesIO(b"\n" * 250 + b"a")
    summary = spool_prompts(data, spool, media_type=TEXT, is_gzip=False)
    assert (summary.rejected.count, len(summary.rejected.first)) == (250, 100)


@pytest.mark.parametrize("length", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES, 3 * MAX_LINE_BYTES])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_very_long_line_is_one_bad_line(length, end):
    prompts, rejected = read(b"a\n" + b"x" * length + end + (b"b\n" if end else b""))
    assert prompts == (["a", "b"] if end else ["a"])
    assert [line for line, _ in rejected] == [2]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('url,Caption \nu1,"a dog, red"\nu2,cat\n', ["a dog, red", "cat"]),
        ("prompt,caption\np,c\n", ["c"]),
        ("prompt\np\n", ["p"]),
        ("a dog,url\na cat,url\n", ["a dog", "a cat"]),
        ('caption\n"over\ntwo lines"\n"a ""b"" c"\n', ["over two lines", 'a "b" c']),
        ('caption\n5" nail\na cat\n', ['5" nail', "a cat"]),
    ],
)
def test_csv_takes_the_named_column_else_the_first(data, expected):
    assert read(data.encode(), CSV) == (expected, [])


def test_bad_csv_rows_are_named_by_their_first_line():
    data = b'n,caption\n1,good\n\n2\n3,"tw\no" x\n4,\xff\n5,fine\n6,"open\n'
    prompts, rejected = read(data, CSV)
    assert prompts == ["good", "fine"]
    assert [line for line, _ in rejected] == [3, 4, 5, 7, 9]


def test_csv_field_that_never_ends_costs_bounded_memory():
    data = io.BytesIO(b'caption\n"' + (b"x" * 99 + b"\n") * 50_000)
    with tempfile.TemporaryFile() as spool, bounded_memory():
        summary = spool_prompts(data, spool, media_type=CSV, is_gzip=False)
    assert "field" in summary.rejected.first[0].reason


def test_tsv_takes_tabs_for_borders_and_quotes_literally():
    data = b'id\tcaption\n1\tsays "hi"\n2\t"quoted ""x"""\n3\t"open, only\n4\n'
    prompts, rejected = read(data, TSV)
    assert prompts == ['says "hi"', 'quoted "x"', '"open, only']
    assert rejected == [(5, "too few columns")]


def test_ndjson_takes_strings_and_objects():
    good = ['"a dog"', '{"caption": "b", "prompt": "c", "x": [1]}', '{"prompt": "d"}']
    bad = ["{", "3", '{"caption": 3}', "{}", '"\\ud800"', "NaN", "[" * 5000, "9" * 5000, '""']
    prompts, rejected = read("\n".join(good + bad).encode(), NDJSON)
    assert prompts == ["a dog", "b", "d"]
    assert [line for line, _ in rejected] == list(range(4, 13))


def test_gzip_is_unpacked_over_several_members():
    data = gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n")
    assert read(data, is_gzip=True) == (["a", "bc", "d"], [])


@pytest.mark.parametrize(
    "data",
    [
        b"not gzip",
        gzip.compress(b"a\nb\n" * 1000)[:-9],
        gzip.compress(b"a\n")[:5],
        gzip.compress(b"a\n")[:-4] + b"\1\2\3\4",
        gzip.compress(b"a\n") + b"junk",
        b"\x1f\x8b\x08\0\0\0\0\0\0\0" + b"\xff" * 50,
    ],
    ids=["plain", "cut", "cut-header", "bad-length", "junk-behind", "bad-data"],
)
def test_broken_gzip_is_refused(data):
    with pytest.raises(UploadError, match="gzip"):
        read(data, is_gzip=True)


def test_gzip_bomb_is_refused_in_constant_memory():
    bomb = gzip.compress(bytes(64 << 20))
    with bounded_memory(), pytest.raises(UploadTooLargeError, match="1 GiB"):
        read(bomb, is_gzip=True, max_bytes=32 << 20)


@pytest.mark.parametrize("media_type", [TEXT, CSV, TSV, NDJSON])
def test_one_line_over_the_limit_is_refused(media_type):
    line = json.dumps("a").encode() + b"\n"
    assert len(read(line * 5, media_type, max_lines=5)[0]) == 5
    with pytest.raises(UploadTooLargeError, match="5 lines"):
        read(line * 6, media_type, max_lines=5)
