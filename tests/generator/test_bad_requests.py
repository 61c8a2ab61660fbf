"""What no client may send: refused as a problem, in few bytes, without repeating any of it."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.settings import GeneratorSettings

MARKER = "Planted-7f3a"
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
GOOD = {"dataset": "pets", "prompts": ["a dog"]}
HEX = "0" * 32


class NoBacklog:
    """A Redis that is gone."""

    def queue_view(self):
        raise RedisConnectionError("gone")

    running_prompts = workers = nudge = queue_view


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """One API for all bad requests, and its root, which has to stay empty."""
    root = tmp_path_factory.mktemp("data")

    with TestClient(create_app(GeneratorSettings(root=root), NoBacklog())) as client:
        yield client, root


def body(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


BODIES = {
    "empty-list": body(prompts=[]),
    "no-list": body(prompts=MARKER),
    "null-list": body(prompts=None),
    "million-characters": body(prompts=[MARKER + "x" * 1_000_000]),
    "1001-prompts": body(prompts=[MARKER] * 1001),
    "half-a-million-numbers": body(prompts=[1] * 500_000),
    "empty-prompt": body(prompts=["a", ""]),
    "blank-prompt": body(prompts=[" \t\n"]),
    "control-character": body(prompts=[MARKER + "\x00"]),
    "escape-character": body(prompts=[MARKER + "\x1b[31m"]),
    "private-character": body(prompts=[MARKER + "\ue000"]),
    "unassigned-character": body(prompts=[MARKER + "\u0378"]),
    "lone-surrogate": body(prompts=[MARKER + "\ud800"]),
    "surrogate-in-a-key": b'{"\\ud800' + MARKER.encode() + b'": 1}',
    "unknown-model": body(model=MARKER.lower()),
    "model-is-a-path": body(model=f"../{MARKER}"),
    "model-is-a-url": body(model=f"https://example.org/{MARKER}"),
    "negative-count": body(images_per_prompt=-1),
    "zero-count": body(images_per_prompt=0),
    "large-count": body(images_per_prompt=65),
    "count-as-text": body(images_per_prompt="4"),
    "count-as-float": body(images_per_prompt=4.0),
    "count-as-boolean": body(images_per_prompt=True),
    "huge-integer": b'{"dataset": "pets", "prompts": ["a"], "seed": ' + b"9" * 5000 + b"}",
    "seed-above-2-53": body(seed=2**53),
    "negative-priority": body(priority=-1),
    "nan": b'{"dataset": "pets", "prompts": ["a"], "guidance_scale": NaN}',
    "infinity": b'{"dataset": "pets", "prompts": ["a"], "guidance_scale": Infinity}',
    "overflow": b'{"dataset": "pets", "prompts": ["a"], "guidance_scale": 1e999}',
    "unknown-scheduler": body(scheduler=MARKER),
    "bad-negative-prompt": body(negative_prompt=MARKER + "\x00"),
    "extra-field": body(**{MARKER: MARKER}),
    "extra-field-with-surrogate": b'{"dataset": "pets", "prompts": ["a"], "\\udc00": 1}',
    "prompt-is-a-number": body(prompts=[3]),
    "prompt-is-an-object": body(prompts=[{MARKER: MARKER}]),
    "prompt-is-null": body(prompts=[None]),
    "top-is-a-list": json.dumps([GOOD]).encode(),
    "top-is-text": json.dumps(MARKER).encode(),
    "empty": b"",
    "not-json": MARKER.encode(),
    "cut": body()[:-3],
    "broken-utf8": b'{"dataset": "pets", "prompts": ["' + MARKER.encode() + b'\xff\xfe"]}',
    "utf16": json.dumps(GOOD).encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 50_000,
    "nul-bytes": bytes(1000),
    "above-the-cap": body(prompts=[MARKER] * 1000, negative_prompt="x" * (3 << 20)),
    **{
        f"dataset-{i}": body(dataset=name)
        for i, name in enumerate(
            [
                "", ".", "..", "../pets", "pets/..", "/etc", "a/b", "a\\b", "Pets", "-a", "_a",
                "a b", "a\n", "a\0", "é", "ａ", "a" * 65, "%2e%2e", "con:", "\u2024\u2024", 3, None,
                ["a"],
            ]
        )
    },
}  # fmt: skip


def assert_refused(answer, root):
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 4096
    assert MARKER.lower() not in answer.text.lower()
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", BODIES)
def test_bad_batch_is_refused(api, name):
    client, root = api
    assert_refused(client.post("/v1/batches", content=BODIES[name], headers=JSON), root)


UPLOAD = "/v1/batches/upload?dataset=pets"
REQUESTS = {
    "no-content-type": ("POST", "/v1/batches", {}, body()),
    "form": ("POST", "/v1/batches", {"content-type": "multipart/form-data"}, body()),
    "text": ("POST", "/v1/batches", {"content-type": f"text/{MARKER}"}, body()),
    "packed": ("POST", "/v1/batches", JSON | {"content-encoding": "gzip"}, gzip.compress(body())),
    "empty-key": ("POST", "/v1/batches", JSON | {"idempotency-key": ""}, body()),
    "long-key": ("POST", "/v1/batches", JSON | {"idempotency-key": MARKER * 50}, body()),
    "negative-length": ("POST", "/v1/batches", JSON | {"content-length": "-1"}, body()),
    "huge-length": ("POST", "/v1/batches", JSON | {"content-length": "9" * 5000}, body()),
    "upload-empty": ("POST", UPLOAD, TEXT, b""),
    "upload-blank": ("POST", UPLOAD, TEXT, b"\n\n\n"),
    "upload-all-bad": ("POST", UPLOAD, TEXT, b"\xff" * 100 + b"\n\0" + MARKER.encode()),
    "upload-no-type": ("POST", UPLOAD, {}, b"a"),
    "upload-other-type": ("POST", UPLOAD, {"content-type": MARKER}, b"a"),
    "upload-charset": ("POST", UPLOAD, {"content-type": "text/plain; charset=utf-16"}, b"a"),
    "upload-br": ("POST", UPLOAD, TEXT | {"content-encoding": "br"}, b"a"),
    "upload-not-gzip": ("POST", UPLOAD, TEXT | {"content-encoding": "gzip"}, MARKER.encode()),
    "upload-cut-gzip": (
        "POST", UPLOAD, TEXT | {"content-encoding": "gzip"}, gzip.compress(b"a\nb\n" * 999)[:-8],
    ),
    "upload-lines": ("POST", UPLOAD, TEXT, b"\n" * 1_000_001),
    "upload-no-dataset": ("POST", "/v1/batches/upload", TEXT, b"a"),
    "upload-bad-dataset": ("POST", f"/v1/batches/upload?dataset=../{MARKER}", TEXT, b"a"),
    "upload-unknown-model": ("POST", f"{UPLOAD}&model={MARKER.lower()}", TEXT, b"a"),
    "upload-extra": ("POST", f"{UPLOAD}&{MARKER}={MARKER}", TEXT, b"a"),
    "upload-nan": ("POST", f"{UPLOAD}&guidance_scale=nan", TEXT, b"a"),
    "upload-infinity": ("POST", f"{UPLOAD}&guidance_scale=inf", TEXT, b"a"),
    "upload-huge": ("POST", f"{UPLOAD}&seed={'9' * 5000}", TEXT, b"a"),
    "upload-float": ("POST", f"{UPLOAD}&images_per_prompt=1.5", TEXT, b"a"),
    "upload-nul": ("POST", f"{UPLOAD}&negative_prompt=%00", TEXT, b"a"),
    "upload-surrogate": ("POST", f"{UPLOAD}&negative_prompt=%ed%a0%80%00", TEXT, b"a"),
    "limit-0": ("GET", "/v1/batches?limit=0", {}, b""),
    "limit-negative": ("GET", "/v1/batches?limit=-1", {}, b""),
    "limit-huge": ("GET", f"/v1/batches?limit={'9' * 5000}", {}, b""),
    "limit-text": ("GET", f"/v1/datasets?limit={MARKER}", {}, b""),
    "cursor-unknown": ("GET", f"/v1/batches?cursor={MARKER}", {}, b""),
    "cursor-huge": ("GET", f"/v1/datasets?cursor={MARKER * 100}", {}, b""),
    "filter": ("GET", f"/v1/batches?dataset=../{MARKER}", {}, b""),
    "after-negative": ("GET", "/v1/datasets/pets/shards?after=-1", {}, b""),
    "after-huge": ("GET", f"/v1/datasets/pets/shards?after={'9' * 30}", {}, b""),
    "image-negative": ("GET", f"/v1/groups/{HEX}/images/-1", {}, b""),
    "image-huge": ("GET", f"/v1/groups/{HEX}/images/{'9' * 5000}", {}, b""),
    "no-batch": ("GET", f"/v1/batches/{MARKER}", {}, b""),
    "no-group": ("GET", f"/v1/groups/{MARKER}", {}, b""),
    "no-path": ("GET", f"/{MARKER}", {}, b""),
    "traversal": ("GET", f"/v1/datasets/..%2f{MARKER}", {}, b""),
    "dots": ("GET", "/v1/datasets/%2e%2e", {}, b""),
    "nul-dataset": ("GET", "/v1/datasets/a%00", {}, b""),
    "nul-batch": ("GET", "/v1/batches/a%00", {}, b""),
    "nul-group": ("POST", "/v1/groups/%00/reject", {}, b""),
    "nul-shard": ("GET", "/v1/datasets/pets/shards/%00", {}, b""),
    "surrogate-shard": ("GET", "/v1/datasets/pets/shards/%ed%a0%80", {}, b""),
    "broken-utf8-path": ("GET", "/v1/batches/%ff%fe", {}, b""),
    "cancel-nothing": ("POST", f"/v1/batches/{HEX}/cancel", {}, b""),
    "method": ("DELETE", "/v1/batches", {}, b""),
    "unknown-method": (MARKER.upper(), "/v1/batches", {}, b""),
    "slash": ("GET", "/v1/batches/", {}, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request_is_refused(api, name):
    client, root = api
    method, path, headers, content = REQUESTS[name]
    answer = client.request(method, path, headers=headers, content=content)
    assert_refused(answer, root)


def test_wrong_method_names_the_right_ones(api):
    client, _ = api
    assert client.delete("/v1/batches").headers["allow"] == "GET, POST"
    assert client.delete(f"/v1/batches/{HEX}").headers["allow"] == "GET"
    assert client.delete("/v1/batches/upload").headers["allow"] == "POST"


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_are_never_a_server_error(api, seed):
    client, _ = api
    rng = random.Random(seed)
    paths = list(client.get("/openapi.json").json()["paths"])
    paths.remove("/v1/events")  # endless
    pieces = ["", "a", "..", "%00", "%ff", "é", "'", '"', "{", "-1", "1e9", "nan", HEX, "%2f", "\\"]

    def piece():
        return "".join(rng.choices(pieces, k=rng.randint(0, 3)))

    for _ in range(60):
        path = rng.choice(paths)
        for name in ("batch_id", "dataset", "name", "gid", "image_index"):
            path = path.replace("{" + name + "}", piece() or "x")
        keys = ["cursor", "limit", "after", "dataset", "seed", "x"]
        query = "&".join(f"{rng.choice(keys)}={piece()}" for _ in range(rng.randint(0, 3)))
        headers = {"range": piece().encode(), "content-type": rng.choice([*JSON.values(), piece()])}
        headers = {k: v if isinstance(v, bytes) else v.encode() for k, v in headers.items()}
        content = rng.choice([b"", rng.randbytes(50), json.dumps({piece(): piece()}).encode()])
        answer = client.request(
            rng.choice(["GET", "POST", "PUT", "HEAD"]), f"{path}?{query}", headers=headers,
            content=content,
        )  # fmt: skip
        expected = 503 if answer.status_code == 503 else 499
        assert answer.status_code <= expected, (path, query, answer.text)
