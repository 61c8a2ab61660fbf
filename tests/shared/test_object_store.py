"""Objects behave as files do, and a name in a store is taken once, whatever goes wrong."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from synthrep_shared import object_client, object_store
from synthrep_shared.errors import StorageError
from synthrep_shared.object_store import (
    ObjectPath,
    abort_uploads,
    list_folders,
    list_objects,
    probe_store,
)
from synthrep_shared.object_stream import ObjectStream
from synthrep_shared.settings import ServiceSettings
from synthrep_shared.storage import DatasetPaths, list_datasets, parse_root, prepare_root

pytestmark = pytest.mark.s3


def test_who_has_no_root_in_a_store_needs_no_botocore() -> None:
    program = (
        "import sys; sys.modules['botocore'] = None; import synthrep_generator.api, "
        "synthrep_generator.worker, synthrep_generator.reconciler, synthrep_trainer.api"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_without_botocore_a_root_in_a_store_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "botocore.config", None)
    object_client.s3_client.cache_clear()
    with pytest.raises(StorageError, match=r"pip install 'synthrep-shared\[s3\]'"):
        prepare_root(ObjectPath("bucket"))


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///key", "http://bucket/key", "s3://bucket/a//b", "s3://bucket/../b"]
)
def test_what_is_no_place_in_a_store_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="expected s3://bucket/prefix"):
        parse_root(url)


def test_a_root_is_read_and_shown_as_it_is_written() -> None:
    settings = ServiceSettings.model_validate({"root": "s3://bucket/some/prefix/"})
    assert settings.root == ObjectPath("bucket", "some/prefix")
    assert settings.model_dump(mode="json")["root"] == "s3://bucket/some/prefix"
    assert str(ObjectPath.from_url("s3://bucket") / "pets") == "s3://bucket/pets"


def test_an_object_is_like_a_file(store_root: ObjectPath) -> None:
    file = store_root / "folder" / "file.txt"
    assert (file.name, file.stem, file.suffix) == ("file.txt", "file", ".txt")
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.open()
    assert file.create(b"one")
    assert not file.create(b"two")
    assert file.read_bytes() == b"one"
    assert file.read_range(1, 100) == b"ne"
    assert file.read_range(3, 1) == b""
    assert file.stat().st_size == 3
    assert file.parent.is_dir()
    file.replace_with(b"three")
    assert file.read_bytes() == b"three"
    file.unlink()
    assert not file.parent.is_dir()


def test_listing_goes_over_pages_in_order(store: Any, store_root: ObjectPath) -> None:
    for name in "cabed":
        (store_root / "folder" / name).create(name.encode())
    (store_root / "other" / "x").create(b"")
    store.requests.clear()
    found = [entry.path.name for entry in list_objects(store_root, after="folder/b", page_size=2)]
    assert found == ["c", "d", "e", "x"]
    assert store.requests["GET"] == 2
    assert list_folders(store_root) == ["folder", "other"]


def test_a_stream_reads_what_the_object_holds() -> None:
    rng = random.Random(3)
    data = rng.randbytes(600_000)
    reads = []

    def read_range(start: int, num_bytes: int) -> bytes:
        reads.append((start, num_bytes))
        return data[start : start + num_bytes]

    assert io.BufferedReader(ObjectStream(read_range)).read() == data
    assert [size for _, size in reads] == [1 << 16, 1 << 17, 1 << 18, 1 << 19]
    with io.BufferedReader(ObjectStream(read_range)) as stream:
        for _ in range(50):
            place, size = rng.randrange(len(data)), rng.randrange(100_000)
            stream.seek(place)
            assert stream.read(size) == data[place : place + size]
        stream.seek(len(data))
        assert stream.read(1) == b""
        with pytest.raises(io.UnsupportedOperation):
            stream.seek(0, io.SEEK_END)


@pytest.fixture
def large_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file that is uploaded in two parts, of the least size that stores take."""
    monkeypatch.setattr(object_store, "_SINGLE_PUT_BYTES", 1 << 20)
    monkeypatch.setattr(object_client, "PART_BYTES", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(6 << 20))
    return path


def test_a_large_file_is_created_in_parts_and_once(store_root: ObjectPath, large_file: Any) -> None:
    target = store_root / "large"
    assert target.create(large_file)
    assert target.read_bytes() == large_file.read_bytes()
    assert not target.create(large_file)
    assert target.open().read() == large_file.read_bytes()


def test_uploads_that_were_never_completed_are_dropped(store_root: ObjectPath) -> None:
    client = object_client.s3_client()
    key = (store_root / "pets" / "shards" / "x").key
    upload = client.create_multipart_upload(Bucket="tests", Key=key)
    started_s = 4e9
    assert abort_uploads(store_root / "fish", started_before_s=started_s) == 0
    assert abort_uploads(store_root, started_before_s=0.0) == 0
    assert abort_uploads(store_root, started_before_s=started_s) == 1
    with pytest.raises(client.exceptions.NoSuchUpload):
        client.list_parts(Bucket="tests", Key=key, UploadId=upload["UploadId"])


@pytest.mark.parametrize("lost", [1, 3])
def test_a_write_whose_answer_was_lost_is_ours(
    store: Any, store_root: ObjectPath, lost: int
) -> None:
    store.lost_answers = lost
    assert (store_root / "a").create(b"mine")
    assert (store_root / "b").create(b"theirs")
    store.lost_answers = lost
    assert not (store_root / "b").create(b"mine")
    assert (store_root / "b").read_bytes() == b"theirs"


def test_a_large_file_whose_answers_were_lost_is_ours(
    store: Any, store_root: ObjectPath, large_file: Any
) -> None:
    store.lost_answers = 1
    assert (store_root / "large").create(large_file)
    assert (store_root / "large").read_bytes() == large_file.read_bytes()


def test_a_conflict_is_tried_again(store: Any, store_root: ObjectPath) -> None:
    store.conflicts = 3
    assert (store_root / "a").create(b"one")
    store.conflicts = 2
    assert not (store_root / "a").create(b"two")
    assert store.faults["conflict"] == 5
    assert (store_root / "a").read_bytes() == b"one"


def test_an_answer_that_breaks_off_is_asked_for_again(store: Any, store_root: ObjectPath) -> None:
    (store_root / "a").create(b"x" * 100_000)
    store.broken_answers = 2
    assert (store_root / "a").read_bytes() == b"x" * 100_000
    assert store.faults["broken"] == 2


def test_of_many_writers_of_a_name_one_succeeds(store_root: ObjectPath) -> None:
    for name in (store_root / "a", store_root / "b", store_root / "c"):
        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(name.create, [b"%d" % i for i in range(8)]))
        assert sum(wins) == 1
        assert name.read_bytes() == b"%d" % wins.index(True)


def test_a_store_that_creates_conditionally_is_taken(store_root: ObjectPath) -> None:
    probe_store(store_root)
    assert list(list_objects(store_root)) == []


def test_a_store_that_overwrites_is_refused_with_advice(store: Any, store_root: ObjectPath) -> None:
    store.is_conditional = False
    with pytest.raises(StorageError, match=r"ignores If-None-Match.*use a store with conditional"):
        prepare_root(store_root)


def test_a_store_that_overwrites_with_parts_only_is_refused(
    store_root: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = object_store.upload_parts
    monkeypatch.setattr(
        object_store, "upload_parts", lambda place, stream, options: upload(place, stream, {})
    )
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        probe_store(store_root)


def test_an_absent_bucket_is_named_with_advice(store: Any) -> None:
    with pytest.raises(StorageError, match=r"s3://absent/x cannot be used.*AWS_ENDPOINT_URL"):
        probe_store(ObjectPath("absent", "x"))


def test_data_sets_are_what_has_objects_under_a_valid_name(store_root: ObjectPath) -> None:
    (DatasetPaths(store_root, "pets").intake / "b.jsonl").create(b"")
    (store_root / "Not A Dataset" / "x").create(b"")
    assert list_datasets(store_root) == ["pets"]
