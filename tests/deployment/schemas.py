"""Strict validation without a cluster: the schemas of Kubernetes and those under `k8s/schemas`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import kubernetes_validate
from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match

from tests.deployment.render import REPOSITORY, Document, title

KUBERNETES = "1.35.0"
_VENDORED = REPOSITORY / "k8s/schemas"


@cache
def _vendored() -> dict[str, Any]:
    schemas = [json.loads(path.read_text()) for path in sorted(_VENDORED.glob("*.json"))]
    return {schema["$id"]: schema for schema in schemas}


def schema_findings(documents: Sequence[Document]) -> Iterator[str]:
    """What the schemas refuse, unknown fields and kinds of which no schema is known among it."""
    for document in documents:
        if problem := _problem(json.dumps(document)):
            yield f"{title(document)}: {problem[:300]}"


@cache
def _problem(text: str) -> str | None:
    document = json.loads(text)
    kind = f"{document['apiVersion']}/{document['kind']}"
    if kind in _vendored():
        schema = {k: v for k, v in _vendored()[kind].items() if k != "$id"}
        error = best_match(Draft7Validator(schema).iter_errors(document))
        return error and f"{error.json_path}: {error.message}"
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as problem:
        return str(problem.message)
    except kubernetes_validate.SchemaNotFoundError:
        return f"no schema of {kind} is known"
    return None
