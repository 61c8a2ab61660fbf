import io
import json
import logging

import pytest

from synthrep_shared.logs import JsonFormatter
from synthrep_shared.settings import ServiceSettings

HOSTILE = 'a dog\n{"level": "error", "event": "forged"}\r\x1b[31mred\x1b[0m\u2028\u0085 \ud800'


def logged(*args: object, **extra: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info(*args, extra=extra)
    return stream.getvalue()


def test_hostile_text_is_one_line_of_ascii_json():
    text = logged("%s was seen", HOSTILE, prompt=HOSTILE)
    assert text.isascii()
    (line,) = text.splitlines()
    entry = json.loads(line)
    assert entry["event"] == f"{HOSTILE} was seen"
    assert entry["prompt"] == HOSTILE
    assert entry["level"] == "info"
    assert "\x1b" not in text


def test_a_refused_setting_does_not_repeat_its_secrets():
    both = {"key": "planted", "key_sha256": "0" * 64}
    with pytest.raises(ValueError, match="api_keys") as raised:
        ServiceSettings.model_validate({"api_keys": [both]})
    assert "planted" not in str(raised.value)
