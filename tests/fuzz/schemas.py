"""Cases from an OpenAPI document: valid and invalid ones of every operation, in equal numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.verdict import Verdict

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
_ENDLESS = ("/v1/events", "/v1/runs/{run_id}/events")  # streams; `abuse` takes them
_OPEN = ("/healthz", "/readyz")
_TIMEOUT_S = 20.0
_EXCUSES = (
    "query: violates `additionalProperties`",  # is ignored, as is usual
    "in body - violates `type` (was string",  # what is no string there is one when it is sent
)
_WITH_REAL_IDS = 0.5
_WITHOUT_KEY = 0.05
_KEYLESS_STATUS = (401, 404, 405, 413)


class Fuzzer:
    """Sends the cases of one service; `ids` are values of parameters that lead somewhere."""

    def __init__(
        self, url: str, key: str, ids: Mapping[str, Sequence[str]], verdict: Verdict, seed: int
    ) -> None:
        self._url, self._ids, self._verdict, self._seed = url, ids, verdict, seed
        self._headers = {"Authorization": f"Bearer {key}"}
        self._rng = random.Random(seed)
        self._session = requests.Session()
        document = requests.get(f"{url}/openapi.json", headers=self._headers, timeout=10).json()
        for operation in (o for path in document["paths"].values() for o in path.values()):
            operation.pop("security", None)  # or most invalid cases would end at the key
        schema = schemathesis.openapi.from_dict(_without_pairs(document))
        operations = [result.ok() for result in schema.get_all_operations()]
        self._operations = [o for o in operations if o.path not in _ENDLESS]

    def run(self, cases: int) -> None:
        """Send so many, again and again to the operations that have so many to offer."""
        goal = self._verdict.cases + cases
        left = [(o, mode) for o in self._operations for mode in GenerationMode]
        turn = 0
        while self._verdict.cases < goal:
            wanted = -(-(goal - self._verdict.cases) // len(left))
            fruitful = []
            for operation, mode in left:
                wanted = min(wanted, goal - self._verdict.cases)
                before = self._verdict.cases
                if wanted:
                    self._explore(operation, mode, wanted, self._seed + turn)
                if self._verdict.cases - before == wanted:
                    fruitful.append((operation, mode))
            left = fruitful or left
            turn += 1

    def _explore(self, operation: Any, mode: GenerationMode, cases: int, seed: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            self._send(case, mode)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # it has no invalid form
            send()

    def _send(self, case: schemathesis.Case, mode: GenerationMode) -> None:
        has_real_ids = self._rng.random() < _WITH_REAL_IDS and self._fill_in(case)
        headers = {} if self._rng.random() < _WITHOUT_KEY else self._headers
        what = f"{mode.value} {case.method} {case.formatted_path[:100]}"
        try:
            answer = case.call(
                base_url=self._url, session=self._session, headers=headers, timeout=_TIMEOUT_S
            )
        except requests.RequestException as error:
            self._verdict.judge("schema", f"{what} {error}", 0, "", b"")
            return
        content_type = (answer.headers.get("content-type") or [""])[0]
        self._verdict.judge("schema", what, answer.status_code, content_type, answer.content)
        if not headers:
            if case.path not in _OPEN and answer.status_code not in _KEYLESS_STATUS:
                self._verdict.accuse(f"{what}: {answer.status_code} without a key")
            return
        checks = list(CHECKS)
        if mode is GenerationMode.NEGATIVE and not has_real_ids:
            checks.append(negative_data_rejection)
        try:
            case.validate_response(answer, checks=checks)
        except (Failure, FailureGroup) as error:
            reasons = getattr(error, "exceptions", [error])
            told = [
                f"{type(r).__name__}: {r}"
                for r in reasons
                if not any(excuse in str(r) for excuse in _EXCUSES)
            ]
            if told:
                self._verdict.accuse(f"{what}: {answer.status_code}: {'; '.join(told)[:600]}")

    def _fill_in(self, case: schemathesis.Case) -> bool:
        """Give parameters and fields real values where there are some; whether there were."""
        parts = (case.path_parameters, case.query, case.body)
        known = [(p, n) for p in parts if isinstance(p, dict) for n in p if n in self._ids]
        for part, name in known:
            part[name] = self._rng.choice(self._ids[name])
        return bool(known)


def _without_pairs(schema: Any) -> Any:
    """Tuples of one type as lists of that type: schemathesis 4.32 trips over `prefixItems`."""
    if isinstance(schema, list):
        return [_without_pairs(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _without_pairs(part) for name, part in schema.items()}
    if "prefixItems" in schema:
        schema["items"] = schema.pop("prefixItems")[0]
    return schema
