import asyncio
import json

import pytest

from synthrep_shared.asgi import Guard, OwnNames, ProblemResponse, validation_problem
from synthrep_shared.keys import ApiKey


async def echo_length(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def call(app, *, method="POST", path="/", headers=(), chunks=(b"",)):
    sent = []
    queue = [
        {"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)}
        for i, c in enumerate(chunks)
    ]

    async def receive():
        return queue.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def test_body_over_the_cap_is_refused_by_its_declared_length():
    app = Guard(echo_length, keys=(), max_body_bytes=10)
    status, headers, body = call(app, headers=[(b"content-length", b"11")], chunks=(b"x" * 11,))
    assert status == 413
    assert headers[b"content-type"] == b"application/problem+json"
    assert json.loads(body)["status"] == 413


def test_chunked_body_over_the_cap_is_refused_while_it_arrives():
    app = Guard(echo_length, keys=(), max_body_bytes=10)
    assert call(app, chunks=(b"x" * 6, b"x" * 6))[0] == 413
    assert call(app, chunks=(b"x" * 5, b"x" * 5))[0] == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), (b"Bearer wrong", 401), (b"Basic right", 401), (b"Bearer right", 200)],
)
def test_only_a_configured_bearer_key_passes(header, status):
    app = Guard(echo_length, keys=map(ApiKey.model_validate, ["right", "other"]), max_body_bytes=10)
    headers = [] if header is None else [(b"authorization", header)]
    assert call(app, headers=headers)[0] == status
    assert call(app, path="/healthz")[0] == 200


@pytest.mark.parametrize(
    ("method", "site", "status"),
    [
        ("POST", b"cross-site", 403),
        ("POST", b"same-site", 403),
        ("POST", b"same-origin", 200),
        ("POST", b"none", 200),
        ("GET", b"cross-site", 200),
    ],
)
def test_a_page_of_another_site_changes_nothing(method, site, status):
    app = Guard(echo_length, keys=(), max_body_bytes=10)
    assert call(app, method=method, headers=[(b"sec-fetch-site", site)])[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:8000", 200),
        (b"127.0.0.1:8000", 200),
        (b"[::1]:8000", 200),
        (None, 200),
        (b"mine.example:8000", 200),
        (b"theirs.example:8000", 421),
        (b"localhost.theirs.example", 421),
        (b"127.0.0.1.theirs.example", 421),
        (b"\xff", 421),
        (b"", 421),
    ],
)
def test_an_open_service_answers_only_under_names_of_this_machine(host, status):
    app = OwnNames(echo_length, keys=(), names=["Mine.example"])
    answer = call(app, headers=[] if host is None else [(b"host", host)])
    assert answer[0] == status
    if status != 200:
        assert b"ALLOWED_HOSTS" in answer[2]
        assert answer[1][b"x-content-type-options"] == b"nosniff"


def test_a_service_with_keys_answers_under_every_name():
    app = OwnNames(echo_length, keys=[ApiKey.model_validate("k")], names=())
    assert call(app, headers=[(b"host", b"generator-api:8000")])[0] == 200


def test_every_answer_carries_security_headers():
    app = Guard(echo_length, keys=[ApiKey.model_validate("k")], max_body_bytes=10)
    for path in ("/", "/healthz"):
        assert call(app, path=path)[1][b"x-content-type-options"] == b"nosniff"


def test_validation_problem_is_short_and_never_echoes_the_input():
    errors = [{"loc": ("body", "x" * 5000), "msg": "m" * 5000, "input": "SECRET"}] * 100
    problem = validation_problem(errors)

    async def app(scope, receive, send):
        await problem(scope, receive, send)

    status, _, body = call(app)
    assert status == 422
    assert len(body) < 4096
    assert b"SECRET" not in body


def test_problem_body_encodes_a_lone_surrogate():
    async def app(scope, receive, send):
        await ProblemResponse(400, "bad \ud800")(scope, receive, send)

    assert call(app)[0] == 400
