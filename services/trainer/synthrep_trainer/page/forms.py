"""A form of the page becomes the request that any client would send, and its curl command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from pydantic import BaseModel

from synthrep_shared.messages import BatchRequest, ProbeRequest, Request, RunRequest
from synthrep_trainer.errors import FormError

_MAX_FIELDS = 100
_LISTS = frozenset({"probe_datasets"})
FORMS: Mapping[str, tuple[type[Request], str]] = {
    "batches": (BatchRequest, "/v1/batches"),
    "runs": (RunRequest, "/v1/runs"),
    "probes": (ProbeRequest, "/v1/probes"),
}
"""By name: what a form makes, and where it goes."""


def fields_of(body: bytes) -> dict[str, list[str]]:
    """What a urlencoded form holds, by name; raises FormError."""
    try:
        return parse_qs(body.decode(), max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise FormError(f"not a form: {error}") from error


def request_from_form(form: str, body: bytes) -> Request:
    """The request that a urlencoded form asks for; raises ValidationError, FormError.

    Blank fields are left to their defaults; `prompts` holds a caption a line.
    """
    model, _ = FORMS[form]
    fields = fields_of(body)
    given: dict[str, Any] = {}
    for name, values in fields.items():
        filled = [value.strip() for value in values if value.strip()]
        if name == "prompts":
            lines = [line.strip() for value in filled for line in value.splitlines()]
            given[name] = [line for line in lines if line]
        elif name in _LISTS and filled:
            given[name] = filled
        elif filled:
            given[name] = filled[-1]
    return model.model_validate(given, strict=False)


def body_of(request: BaseModel) -> str:
    """The request as JSON, what was not given left out."""
    fields = request.model_dump(mode="json", exclude_unset=True)
    return json.dumps(fields, ensure_ascii=False)


def curl(url: str, *, body: str | None = None, has_key: bool, method: str = "POST") -> str:
    """The command for one call; the key is named, not shown."""
    parts = [f"curl -X {method} {shlex.quote(url)}"]
    if has_key:
        parts.append('-H "Authorization: Bearer $SYNTHREP_API_KEY"')
    if body is not None:
        parts += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(body)}"]
    return " \\\n  ".join(parts)


def problems(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """What pydantic found, a sentence for each place."""
    sentences = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"])
        message = str(error["msg"]).removeprefix("Value error, ")
        sentences.append(f"{place}: {message}" if place else message)
    return sentences
