import hashlib
import hmac

import pytest
from pydantic import SecretStr, ValidationError

from synthrep_shared import keys
from synthrep_shared.keys import ALL_SCOPES, OPEN, ApiKey, KeyRing
from synthrep_shared.settings import ServiceSettings

SECRET = "5f2c9d0e-planted"


def ring(*entries) -> KeyRing:
    return KeyRing([ApiKey.model_validate(entry) for entry in entries])


def test_a_plain_string_has_every_scope_and_the_owner_that_it_always_had():
    (key,) = [ApiKey.model_validate(SECRET)]
    digest = hashlib.sha256(b"synthrep-owner:" + SECRET.encode()).hexdigest()[:16]
    assert key.principal.owner == digest
    assert key.principal.scopes == set(ALL_SCOPES)
    assert key == ApiKey.model_validate(SecretStr(SECRET))


def test_a_key_is_forgotten_once_it_was_read():
    for entry in (SECRET, {"name": "lab", "key": SECRET}):
        key = ApiKey.model_validate(entry)
        settings = ServiceSettings(api_keys=(key,))
        assert SECRET not in repr(key) + repr(vars(key)) + repr(settings)
        digest = key.key_sha256.get_secret_value()
        assert digest not in settings.model_dump_json()


def test_a_digest_opens_what_its_key_opens():
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    found = ring({"name": "lab", "key_sha256": digest}).find(f"Bearer {SECRET}".encode())
    assert found is not None
    assert found.owner == "lab"


def test_two_live_keys_of_one_name_are_one_owner():
    both = ring({"name": "lab", "key": "old"}, {"name": "lab", "key": "new"})
    owners = [both.find(f"Bearer {key}".encode()).owner for key in ("old", "new")]
    assert owners == ["lab", "lab"]
    assert both.find(b"Bearer another") is None


def test_a_service_without_keys_is_open():
    assert ring().find(b"") is OPEN


@pytest.mark.parametrize("sent", [b"", b"one", b"Basic one", b"Bearer", b"Bearer two two", b"\xff"])
def test_other_headers_find_nobody(sent):
    assert ring("one", "two").find(sent) is None


@pytest.mark.parametrize(
    "sent", [b"Bearer first", b"Bearer third", b"Bearer none", b"Basic x", b""]
)
def test_every_digest_is_compared_whichever_matches(monkeypatch, sent):
    known = ring("first", "second", "third")
    compared = []
    compare_digest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare_digest(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    known.find(sent)
    assert compared == [hashlib.sha256(k).digest() for k in (b"first", b"second", b"third")]


@pytest.mark.parametrize(
    "entry",
    [
        "",
        {},
        {"name": "lab"},
        {"key": "k", "key_sha256": "0" * 64},
        {"key_sha256": "0" * 64},
        {"name": "lab", "key_sha256": "0" * 63},
        {"name": "Lab", "key": "k"},
        {"key": "k", "scopes": []},
        {"key": "k", "scopes": ["root"]},
        {"key": "k", "scopes": ["admin"], "datasets": ["pets"]},
        {"key": "k", "max_prompts_per_day": 0},
        {"key": "k", "surprise": 1},
        {"key": 3},
    ],
)
def test_a_malformed_key_is_refused(entry):
    with pytest.raises(ValidationError):
        ApiKey.model_validate(entry)


def test_the_same_key_twice_is_refused():
    with pytest.raises(ValidationError, match="given twice"):
        ServiceSettings.model_validate({"api_keys": ["one", {"name": "lab", "key": "one"}]})


def test_names_and_prefixes_of_data_sets():
    entry = {"key": "k", "scopes": ["read"], "datasets": ["pets", "birds-*"]}
    who = ApiKey.model_validate(entry).principal
    assert [who.lists(d) for d in ("pets", "pets2", "birds-", "birds-x", "birds")] == [
        True, False, True, True, False,
    ]  # fmt: skip
