"""The generator with its root in an object store: the same answers, the same promises."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.dataset_files import OpenDatasets
from synthrep_generator.feeder import DatasetFeed, cut_chunks
from synthrep_generator.intake import IntakeReader, read_headers
from synthrep_generator.janitor import remove_leftovers
from synthrep_generator.repair import repair_dataset
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.verify import DatasetReport, verify_dataset
from synthrep_shared import object_client
from synthrep_shared.commit_log import CommitLog, read_log
from synthrep_shared.errors import StorageError
from synthrep_shared.object_store import ObjectPath, list_objects
from synthrep_shared.storage import DatasetPaths, spool_folder

pytestmark = pytest.mark.s3

PROMPTS = ["a dog", "a cat", "a hen", "an owl"]


@pytest.fixture
def root(store_root: ObjectPath) -> ObjectPath:
    """The root of this module's data sets."""
    return store_root


@pytest.fixture
def done(pets: Any) -> Any:
    """Two prompts committed in one shard, one failed, one undecided."""
    header = pets.accept(PROMPTS)
    pets.commit(header, {0: PROMPTS[0], 1: PROMPTS[1]})
    pets.fail(header, {2: PROMPTS[2]})
    return pets


@pytest.fixture
def client(root: ObjectPath, backlog: Any) -> Iterator[TestClient]:
    """The API over the object store."""
    settings = GeneratorSettings(root=root, reserve_bytes=0, copy_bytes=1 << 20)
    with TestClient(create_app(settings, backlog)) as client:
        yield client


def check(paths: DatasetPaths) -> DatasetReport:
    return verify_dataset(paths, now_s=time.time(), min_age_s=3600)


def test_a_batch_is_accepted_once(client: TestClient, root: ObjectPath) -> None:
    body = {"dataset": "pets", "prompts": PROMPTS}
    key = {"idempotency-key": "k"}
    answers = [client.post("/v1/batches", json=body, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    other = client.post("/v1/batches", json=body | {"prompts": ["x"]}, headers=key)
    assert other.status_code == 409
    paths = DatasetPaths(root, "pets")
    assert len(list(list_objects(paths.intake))) == 1
    reader = IntakeReader(paths, answers[0].json()["id"])
    assert reader.prompts(0, 10) == PROMPTS
    assert not list(spool_folder(root).rglob("*.part"))


def test_an_upload_is_accepted_and_read_from_anywhere(client: TestClient, root: ObjectPath) -> None:
    lines = [f"prompt {i} " + "x" * 200 for i in range(2000)]
    answer = client.post(
        "/v1/batches/upload?dataset=pets",
        content="\n".join(lines),
        headers={"content-type": "text/plain"},
    )
    assert answer.json()["prompts_accepted"] == 2000
    reader = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"])
    for start in (1990, 0, 700, 1300):
        assert reader.prompts(start, 20) == lines[start : start + 20]


def test_batches_are_paused_resumed_and_cancelled(client: TestClient, root: ObjectPath) -> None:
    body = {"dataset": "pets", "prompts": PROMPTS}
    batch = client.post("/v1/batches", json=body).json()["id"]
    feed = DatasetFeed(DatasetPaths(root, "pets"), job_images=100)
    feed.refresh()
    for verb, state, chunks in (("pause", "paused", 0), ("resume", "queued", 1)):
        assert client.post(f"/v1/batches/{batch}/{verb}").json()["state"] == state
        assert len(cut_chunks([feed], frozenset(), room=9)) == chunks
    assert client.post(f"/v1/batches/{batch}/cancel").json()["state"] == "cancelled"
    feed.refresh()
    assert cut_chunks([feed], frozenset(), room=9) == []
    assert check(DatasetPaths(root, "pets")).cancelled == len(PROMPTS)


def test_progress_shards_and_failures_are_answered(client: TestClient, done: Any) -> None:
    prompts = client.get(f"/v1/batches/{'b' * 32}").json()["prompts"]
    assert (prompts["committed"], prompts["failed"], prompts["queued"]) == (2, 1, 1)
    (failure,) = client.get(f"/v1/batches/{'b' * 32}/failures").json()["items"]
    assert (failure["index"], failure["reason"]) == (2, "nsfw")
    (view,) = client.get("/v1/datasets").json()["items"]
    assert (view["name"], view["shards"], view["last_seq"]) == ("pets", 1, 2)
    (shard,) = client.get("/v1/datasets/pets/shards").json()["items"]
    assert client.get("/readyz").status_code == 200
    url = f"/v1/datasets/pets/shards/{shard['name']}"
    data = (done.paths.shards / shard["name"]).read_bytes()
    assert client.get(url).content == data
    for start, end in ((0, 9), (100, 4000), (len(data) - 5, len(data) - 1)):
        answer = client.get(url, headers={"range": f"bytes={start}-{end}"})
        assert answer.status_code == 206
        assert answer.content == data[start : end + 1]
    assert client.get(url, headers={"range": f"bytes={len(data)}-"}).status_code == 416
    (done.paths.shards / shard["name"]).unlink()
    assert client.get(url).status_code == 200  # there is a copy
    for copy in spool_folder(done.paths.root).rglob("*.tar"):
        copy.unlink()
    assert client.get(url).status_code == 404


def test_groups_are_shown_and_taken_back(client: TestClient, done: Any) -> None:
    ref = next(read_log(done.paths.log)).groups[1]
    view = client.get(f"/v1/groups/{ref.gid}").json()
    assert [sample["caption"] for sample in view["samples"]] == ["a cat", "a cat"]
    image = client.get(f"/v1/groups/{ref.gid}/images/1")
    assert image.content == done.image(ref.gid, 1)
    assert client.post(f"/v1/groups/{ref.gid}/reject").json()["rejected"] is True
    assert client.post(f"/v1/groups/{ref.gid}/reject").json()["rejected"] is True
    assert [r.kind for r in read_log(done.paths.log)] == ["shard", "failure", "reject"]


def test_a_shard_that_is_not_what_its_record_says_is_not_handed_out(
    client: TestClient, done: Any
) -> None:
    record = next(read_log(done.paths.log))
    (done.paths.shards / record.name).replace_with(b"x" * record.bytes)
    with pytest.raises(StorageError, match="not what its record says"):
        client.get(f"/v1/datasets/pets/shards/{record.name}")
    assert not list(spool_folder(done.paths.root).rglob("*.tar"))


def test_copies_make_room_for_new_ones(root: ObjectPath, pets: Any, backlog: Any) -> None:
    header = pets.accept(PROMPTS)
    records = [pets.commit(header, {i: prompt}) for i, prompt in enumerate(PROMPTS)]
    settings = GeneratorSettings(root=root, reserve_bytes=0, copy_bytes=2 * records[0].bytes)
    with TestClient(create_app(settings, backlog)) as client:
        for record in records:
            assert client.get(f"/v1/datasets/pets/shards/{record.name}").status_code == 200
            copies = list(spool_folder(root).rglob("*.tar"))
            assert len(copies) <= 2
            for copy in copies:
                os.utime(copy, (0, 0))


@pytest.fixture
def hasty_client(store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client of this process asks once."""
    monkeypatch.setattr(object_client, "ATTEMPTS", 1)
    object_client.s3_client.cache_clear()
    yield
    object_client.s3_client.cache_clear()


def test_a_store_that_does_not_answer_is_503_and_comes_back(
    store: Any, hasty_client: None, client: TestClient, done: Any
) -> None:
    body = {"dataset": "pets", "prompts": ["a fox"]}
    calls = [("GET", "/v1/datasets", None), ("GET", "/readyz", None), ("POST", "/v1/batches", body)]
    store.error_rate, store.hang_s = 1.0, 0.0
    for method, url, json in calls:
        answers = {client.request(method, url, json=json).status_code for _ in range(5)}
        assert answers <= {503, 200, 202}
        assert 503 in answers
    store.heal()
    assert [client.request(m, u, json=j).status_code for m, u, j in calls] == [200, 200, 202]


def test_a_whole_data_set_is_clean_and_counted(done: Any) -> None:
    report = check(done.paths)
    assert report.is_clean
    counts = (report.accepted, report.committed, report.failed, report.cancelled, report.undecided)
    assert counts == (4, 2, 1, 0, 1)
    assert (report.records, report.shards, report.images) == (2, 1, 4)


def shard(pets: Any) -> ObjectPath:
    return next(list_objects(pets.paths.shards)).path


def drop_shard(pets: Any) -> None:
    shard(pets).unlink()


def flip_a_bit(pets: Any) -> None:
    data = bytearray(shard(pets).read_bytes())
    data[700] ^= 1
    shard(pets).replace_with(bytes(data))


def make_a_hole(pets: Any) -> None:
    next(list_objects(pets.paths.log)).path.unlink()


def lose_an_intake_line(pets: Any) -> None:
    file = next(list_objects(pets.paths.intake)).path
    lines = file.read_bytes().splitlines(keepends=True)
    file.replace_with(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    ("break_it", "kinds"),
    [
        (drop_shard, {"missing"}),
        (flip_a_bit, {"corrupt"}),
        (make_a_hole, {"log"}),
        (lose_an_intake_line, {"intake"}),
    ],
)
def test_damage_is_found(done: Any, break_it: Any, kinds: set[str]) -> None:
    break_it(done)
    assert {damage.kind for damage in check(done.paths).damage} == kinds


@pytest.fixture
def littered(done: Any) -> Any:
    """Orphans of numbers 1 and 19 behind a log of 18 records, an old and a young local file."""
    for name in ("00000001-" + "a" * 12, "00000019-" + "b" * 12):
        (done.paths.shards / f"{name}.tar").create(b"")
    log = CommitLog(done.paths.log)
    for _ in range(16):
        log.append("reject", name=lambda _: "nobody")
    return done


def test_what_may_still_be_committed_is_no_leftover(littered: Any) -> None:
    name = f"00000001-{'a' * 12}.tar"
    report = check(littered.paths)
    assert report.leftovers == [f"shards/{name}"]
    repairs = repair_dataset(littered.paths, now_s=time.time(), min_age_s=3600)
    assert repairs.removed == [f"shards/{name}"]
    assert check(littered.paths).leftovers == []
    assert (littered.paths.shards / f"00000019-{'b' * 12}.tar").exists()


def test_the_janitor_removes_what_is_old_and_lost(littered: Any) -> None:
    assert remove_leftovers(littered.paths, now_s=time.time()) == 0
    client, key = object_client.s3_client(), (littered.paths.shards / "x").key
    client.create_multipart_upload(Bucket="tests", Key=key)
    assert remove_leftovers(littered.paths, now_s=time.time() + 2 * 86_400) == 1
    assert "Uploads" not in client.list_multipart_uploads(Bucket="tests", Prefix=key)
    assert {file.path.name for file in list_objects(littered.paths.shards)} == {
        next(read_log(littered.paths.log)).name,
        f"00000019-{'b' * 12}.tar",
    }


def test_nothing_accepted_is_no_data_set(root: ObjectPath) -> None:
    with pytest.raises(StorageError, match="no data set 'fish'"):
        check(DatasetPaths(root, "fish"))
    with pytest.raises(StorageError, match="no data set 'fish'"):
        OpenDatasets(root)["fish"]


def test_a_full_spool_refuses_batches(root: ObjectPath, backlog: Any) -> None:
    settings = GeneratorSettings(root=root, reserve_bytes=1 << 62)
    with TestClient(create_app(settings, backlog)) as client:
        answer = client.post("/v1/batches", json={"dataset": "pets", "prompts": PROMPTS})
    assert answer.status_code == 507
    assert list(list_objects(root)) == []


def test_headers_come_in_parallel_and_a_malformed_one_is_passed_over(pets: Any) -> None:
    batches = [f"{i:032x}" for i in range(40)]
    for batch in batches:
        pets.accept(["a dog"], batch=batch)
    (pets.paths.intake / "bad.jsonl").create(b"{}\n")
    headers = dict(read_headers(pets.paths, [*batches, "bad"]))
    assert headers.pop("bad") is None
    assert [header.id for header in headers.values() if header] == batches
