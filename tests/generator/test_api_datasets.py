from __future__ import annotations

from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.settings import GeneratorSettings


def test_shard_is_served_whole_and_in_ranges(client, pets):
    header = pets.accept(["a"])
    record = pets.commit(header, {0: "a"})
    data = (pets.paths.shards / record.name).read_bytes()
    url = f"/v1/datasets/pets/shards/{record.name}"
    whole = client.get(url)
    assert whole.content == data
    assert whole.headers["etag"] == f'"{record.sha256}"'
    assert whole.headers["content-type"] == "application/x-tar"
    part = client.get(url, headers={"range": "bytes=512-1023"})
    assert (part.status_code, part.content) == (206, data[512:1024])
    assert part.headers["content-range"] == f"bytes 512-1023/{len(data)}"
    assert client.get(url, headers={"range": "bytes=-10"}).content == data[-10:]
    head = client.head(url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))


def test_bad_range_is_a_problem(client, pets):
    record = pets.commit(pets.accept(["a"]), {0: "a"})
    url = f"/v1/datasets/pets/shards/{record.name}"
    ranges = ["bytes=999999999-", "bytes=5-1", "lines=1-2", "bytes", "bytes=", "bytes=--5"]
    for value in [*ranges, "x" * 999, "bytes=" + "9" * 5000 + "-"]:
        answer = client.get(url, headers={"range": value})
        assert answer.status_code == 416, value
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["content-range"].startswith("bytes */")


def test_a_log_that_cannot_be_read_is_a_problem_of_its_data_set_only(client, pets):
    header = pets.accept(["a"])
    pets.paths.log.write_text("no record\n")
    for url in ("/v1/datasets/pets", "/v1/datasets/pets/shards", f"/v1/batches/{header.id}"):
        answer = client.get(url)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30"), url
        assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/datasets").status_code == 200
    answer = client.post("/v1/batches", json={"dataset": "birds", "prompts": ["b"]})
    assert answer.status_code == 202


def test_only_shards_that_the_log_names_are_served(client, pets):
    pets.commit(pets.accept(["a"]), {0: "a"})
    (pets.paths.shards / "00000002-abcabcabcabc.tar").write_bytes(b"not committed")
    names = ["00000002-abcabcabcabc.tar", "..%2f..%2fpets%2flog%2fcommits.jsonl", "commits.jsonl"]
    for name in names:
        answer = client.get(f"/v1/datasets/pets/shards/{name}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_group_tells_where_its_images_come_from(client, pets):
    header = pets.accept(["a", "b", "c"])
    record = pets.commit(header, {0: "a", 1: "b"})
    pets.fail(header, {2: "c"}, "too dark")
    gid = header.gid(1, "b")
    group = client.get(f"/v1/groups/{gid}").json()
    assert (group["state"], group["shard"], group["index"]) == ("committed", record.name, 1)
    assert [s["image_index"] for s in group["samples"]] == [0, 1]
    assert group["samples"][0]["caption"] == "b"
    for k in range(2):
        image = client.get(f"/v1/groups/{gid}/images/{k}")
        assert image.content == pets.image(gid, k)
        assert image.headers["content-type"] == "image/jpeg"
    assert client.get(f"/v1/groups/{gid}/images/2").status_code == 404
    failed = client.get(f"/v1/groups/{header.gid(2, 'c')}").json()
    assert (failed["state"], failed["failure"]["reason"]) == ("failed", "too dark")
    assert client.get(f"/v1/groups/{header.gid(2, 'c')}/images/0").status_code == 404
    assert client.post(f"/v1/groups/{header.gid(2, 'c')}/reject").status_code == 409
    assert client.get(f"/v1/groups/{'0' * 32}").status_code == 404


def test_rejected_group_is_a_tombstone_in_the_log(client, pets):
    header = pets.accept(["a"])
    pets.commit(header, {0: "a"})
    gid = header.gid(0, "a")
    for _ in range(2):
        assert client.post(f"/v1/groups/{gid}/reject").json()["rejected"] is True
    assert pets.log.refresh() == 2
    assert client.get("/v1/datasets/pets").json()["rejected"] == 1


def test_no_request_is_served_from_outside_the_root(root, backlog):
    secret = root.parent / "secret"
    (secret / "intake").mkdir(parents=True)
    (secret / "intake" / f"{'a' * 32}.jsonl").write_text("{}")
    with TestClient(create_app(GeneratorSettings(root=root), backlog)) as client:
        for name in ("..%2fsecret", "%2e%2e%2fsecret", "..", "secret%00", "%2e%2e"):
            assert client.get(f"/v1/datasets/{name}").status_code in (404, 422)
            assert client.get(f"/v1/batches/{name}%2f{'a' * 32}").status_code in (404, 422)
