from __future__ import annotations

import asyncio
import gzip
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.intake import IntakeReader
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.storage import DatasetPaths

URL = "/v1/batches/upload"


def upload(client, content, media_type="text/plain", headers=None, **query):
    headers = {"content-type": media_type, **(headers or {})}
    query = {"dataset": "pets", **query}
    return client.post(URL, params=query, content=content, headers=headers)


def test_upload_is_one_batch_with_the_settings_of_its_query(client, root, backlog):
    answer = upload(
        client,
        b"a dog\n\nbad\0line\na cat",
        "text/plain; charset=utf-8",
        images_per_prompt=3,
        guidance_scale=1.5,
        negative_prompt="blurry",
        seed=9,
        priority=1,
    )
    assert answer.status_code == 202
    body = answer.json()
    assert body["prompts_accepted"] == 2
    assert body["rejected"]["count"] == 2
    assert [line["line"] for line in body["rejected"]["first"]] == [2, 3]
    reader = IntakeReader(DatasetPaths(root, "pets"), body["id"])
    assert reader.prompts(0, 9) == ["a dog", "a cat"]
    settings = reader.header.settings
    assert (settings.images_per_prompt, settings.guidance_scale, settings.seed) == (3, 1.5, 9)
    assert (settings.negative_prompt, reader.header.priority) == ("blurry", 1)
    assert settings.num_inference_steps is not None
    assert backlog.nudges == 1
    assert client.get(body["links"]["self"]).json()["prompts"]["queued"] == 2


def test_upload_takes_a_gate_as_json(client, root):
    answer = upload(client, b"a dog", quality_gate='{"blank": false}')
    header = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"]).header
    assert header.settings.quality_gate.blank is False
    assert upload(client, b"a dog", quality_gate='{"safety": true}').status_code == 422
    assert upload(client, b"a dog", quality_gate="blank").status_code == 422


def test_upload_finds_the_charset_among_other_parameters(client):
    for parameters, status in (
        ("charset=utf-8; header=present", 202),
        ("header=present; charset=utf-8", 202),
        ("header=present; charset=latin-1", 415),
    ):
        answer = upload(client, b"caption\na dog", f"text/csv; {parameters}")
        assert answer.status_code == status, parameters


def test_upload_takes_a_mixture_as_json(client, root):
    mixture = '[{"guidance_scale": 1, "weight": 2}, {"guidance_scale": 4.5}]'
    answer = upload(client, b"a dog\na cat\na hen", mixture=mixture)
    assert answer.status_code == 202
    header = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"]).header
    scales = [header.settings_of(index).guidance_scale for index in range(3)]
    assert sorted(scales) == [1.0, 1.0, 4.5]
    for wrong in ("tiny", '[{"weight": -1}]', '[{"model": "absent"}]'):
        assert upload(client, b"a dog", mixture=wrong).status_code == 422


@pytest.mark.parametrize("seed", range(3))
def test_upload_does_not_depend_on_how_the_body_is_cut(client, root, seed):
    rng = random.Random(seed)
    prompts = [f"prompt {i} " + "é" * rng.randint(0, 50) for i in range(500)]
    data = gzip.compress("\n".join(prompts).encode())

    def chunks():
        start = 0
        while start < len(data):
            size = rng.randint(1, 200)
            yield data[start : start + size]
            start += size

    answer = upload(client, chunks(), headers={"content-encoding": "gzip"})
    reader = IntakeReader(DatasetPaths(root, "pets"), answer.json()["id"])
    assert reader.prompts(0, 1000) == [prompt.strip() for prompt in prompts]


def test_upload_is_safe_to_repeat_with_a_key(client):
    key = {"idempotency-key": "k"}
    first = upload(client, b"a\nb\n\n", headers=key)
    again = upload(client, b"a\nb\n\n", headers=key)
    assert again.json() == first.json()
    assert upload(client, b"a\nc\n", headers=key).status_code == 409
    assert upload(client, b"a\nb\n\n", headers=key, seed=1).status_code == 409


def test_upload_equals_the_same_prompts_as_json(client):
    key = {"idempotency-key": "k"}
    first = upload(client, b"a\nb\n", headers=key)
    same = client.post("/v1/batches", json={"dataset": "pets", "prompts": ["a", "b"]}, headers=key)
    assert same.json()["id"] == first.json()["id"]


def test_upload_above_the_mark_leaves_nothing(root, backlog):
    settings = GeneratorSettings(root=root, high_water_prompts=3, reserve_bytes=0)
    with TestClient(create_app(settings, backlog)) as client:
        assert upload(client, b"a\nb\nc\nd\n").status_code == 429
        assert list(root.iterdir()) == []
        assert upload(client, b"a\nb\nc\n").status_code == 202


def test_concurrent_uploads_pass_the_mark_by_none(root, backlog):
    settings = GeneratorSettings(root=root, high_water_prompts=25, reserve_bytes=0)
    with TestClient(create_app(settings, backlog)) as client, ThreadPoolExecutor(8) as pool:
        bodies = [b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n"] * 16
        statuses = list(pool.map(lambda body: upload(client, body).status_code, bodies))
        accepted = sum(b["prompts"]["accepted"] for b in client.get("/v1/batches").json()["items"])
    assert set(statuses) == {202, 429}
    assert accepted == 10 * statuses.count(202) <= 25


def test_failed_upload_gives_its_place_back(client):
    for _ in range(10):
        assert upload(client, b"not gzip", headers={"content-encoding": "gzip"}).status_code == 422
    assert upload(client, b"a").status_code == 202


async def call(app, messages):
    """Status of an upload whose client sends these messages and then nothing."""
    waiting, sent = iter(messages), []

    async def receive():
        message = next(waiting, None)
        if message is None:
            await asyncio.sleep(3600)
        return message

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(),
        "query_string": b"dataset=pets", "headers": [(b"content-type", b"text/plain")],
        "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
        "asgi": {"version": "3.0"},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=20)
    return sent[0]["status"]


PART = {"type": "http.request", "body": b"a\nb", "more_body": True}


def test_upload_that_stops_coming_is_given_up(settings, backlog, root, monkeypatch):
    monkeypatch.setattr("synthrep_generator.routes_uploads._SILENCE_S", 0.05)
    assert asyncio.run(call(create_app(settings, backlog), [PART, PART])) == 408
    assert list(root.iterdir()) == []


def test_upload_of_a_client_that_goes_away_leaves_nothing(settings, backlog, root):
    gone = {"type": "http.disconnect"}
    assert asyncio.run(call(create_app(settings, backlog), [PART, gone])) == 400
    assert list(root.iterdir()) == []


def test_upload_beyond_the_cap_is_cut_off(settings, backlog, root, monkeypatch):
    monkeypatch.setattr("synthrep_generator.api.MAX_BYTES", 5)
    assert asyncio.run(call(create_app(settings, backlog), [PART, PART])) == 413
    assert list(root.iterdir()) == []
