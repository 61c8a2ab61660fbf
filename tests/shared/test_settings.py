import json

import pytest

from synthrep_shared.keys import ApiKey
from synthrep_trainer.settings import TrainerSettings

VARIABLE = "SYNTHREP_TRAINER_API_KEYS"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (json.dumps(["one", "two"]), 2),
        (json.dumps([{"name": "lab", "key": "one"}, "two"]), 2),
        (json.dumps({"name": "lab", "key": "one"}), 1),
        ("one\n", 1),
    ],
)
def test_keys_come_from_a_file(monkeypatch, tmp_path, text, names):
    file = tmp_path / "keys"
    file.write_text(text)
    monkeypatch.setenv(f"{VARIABLE}_FILE", str(file))
    settings = TrainerSettings()
    assert len(settings.api_keys) == names
    first = settings.api_keys[0].key_sha256
    assert first == ApiKey.model_validate("one").key_sha256


def test_keys_come_from_a_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, '["one", {"name": "lab", "key": "two", "scopes": ["read"]}]')
    assert [key.scopes[0] for key in TrainerSettings().api_keys] == ["submit", "read"]
