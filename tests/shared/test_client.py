import httpx
import pytest

from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import ProbeRequest, RunRequest


def client(handler, **kwargs):
    return SynthRep(transport=httpx.MockTransport(handler), **kwargs)


def test_submission_is_repeated_under_one_idempotency_key():
    keys = []

    def handler(request):
        keys.append(request.headers["idempotency-key"])
        if len(keys) < 3:
            return httpx.Response(503, headers={"retry-after": "0"})
        body = {"id": "1", "dataset": "d", "prompts_accepted": 1, "links": {}}
        return httpx.Response(202, json=body)

    with client(handler) as synthrep:
        assert synthrep.submit("d", ["a dog"]).id == "1"
    assert len(keys) == 3
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    "start",
    [
        lambda synthrep: synthrep.train(RunRequest(dataset="d", max_steps=1)),
        lambda synthrep: synthrep.start_probe(ProbeRequest(run_id="r", dataset="digits")),
    ],
)
def test_a_run_or_probe_is_started_under_one_idempotency_key(start):
    keys = []

    def handler(request):
        keys.append(request.headers["idempotency-key"])
        if len(keys) % 2:
            return httpx.Response(429, headers={"retry-after": "0"})
        return httpx.Response(409, json={"title": "Conflict", "status": 409})

    with client(handler) as synthrep:
        for _ in range(2):
            with pytest.raises(ServiceError):
                start(synthrep)
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_problem_details_become_one_sentence():
    problem = {
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "no",
        "errors": [{"field": "prompts", "message": "too long"}],
    }
    with (
        client(lambda request: httpx.Response(422, json=problem)) as synthrep,
        pytest.raises(ServiceError, match="no; prompts: too long"),
    ):
        synthrep.submit("d", ["x"])


def test_unreachable_service_says_what_to_check():
    def handler(request):
        raise httpx.ConnectError("refused")

    with (
        client(handler, retries=0) as synthrep,
        pytest.raises(ServiceUnavailableError, match="is the service running"),
    ):
        synthrep.batch("x")


def test_lists_follow_the_cursor():
    def handler(request):
        start = int(request.url.params.get("cursor", 0))
        item = {"name": f"d{start}", "shards": 0, "groups": 0, "images": 0, "bytes": 0,
                "last_seq": 0}  # fmt: skip
        following = str(start + 1) if start < 2 else None
        return httpx.Response(200, json={"items": [item], "next_cursor": following})

    with client(handler) as synthrep:
        assert [d.name for d in synthrep.datasets()] == ["d0", "d1", "d2"]


def test_key_is_sent_as_bearer():
    def handler(request):
        assert request.headers["authorization"] == "Bearer secret"
        return httpx.Response(200, json={"items": [], "next_cursor": None})

    with client(handler, api_key="secret") as synthrep:
        assert list(synthrep.batches()) == []
