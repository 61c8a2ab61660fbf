"""OpenTelemetry spans from a request to its shards and to the training batches they are in.

On where OTEL_EXPORTER_OTLP_ENDPOINT (or …_TRACES_ENDPOINT) is set and the extra `trace` is
installed; the SDK reads the other OTEL_… variables. Without them nothing is imported.

No context travels with the work: neither jobs nor shards nor log records hold one, so that they
stay functions of what was asked for. Instead the ids of a trace follow from the id of what it is
about: who knows a batch's id can add to its trace. Spans are recorded when they are over.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Protocol

_log = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_MAX_LINKS = 32
_EXPORT_S = 2.0  # for which the end of a process waits in vain for a collector that is gone
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
CALLER: ContextVar[str] = ContextVar("traceparent", default="")
"""The header `traceparent` of the request at hand."""


class Tracer(Protocol):
    """Takes spans that are over; returns at once."""

    @property
    def is_on(self) -> bool:
        """Whether anybody wants them."""
        ...

    def record(
        self,
        name: str,
        *,
        about: str,
        seconds: float,
        is_root: bool = False,
        links: Iterable[str] = (),
        **facts: str | int | float,
    ) -> None:
        """Something that took `seconds` and is over, in the trace about what has this id.

        `is_root`: the others of that trace lie below it. `links` are what other traces are about.
        """
        ...  # fmt: skip


class NoTracer:
    """See Tracer; records nothing."""

    is_on = False

    def record(self, name: str, **_: object) -> None:
        """See Tracer."""


class OtlpTracer:
    """See Tracer; hands spans to an exporter of OpenTelemetry, in its thread."""

    is_on = True

    def __init__(self, service: str, processor: Any = None) -> None:
        """`processor` takes the spans in place of an OTLP exporter; ImportError without the SDK."""
        self._api = importlib.import_module("opentelemetry.trace")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        if processor is None:
            http = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            export = importlib.import_module("opentelemetry.sdk.trace.export")
            processor = export.BatchSpanProcessor(http.OTLPSpanExporter(timeout=_EXPORT_S))
        resource = resources.Resource.create({"service.name": f"synthrep-{service}"})
        self._ids = _Ids()
        provider = sdk.TracerProvider(resource=resource, id_generator=self._ids)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("synthrep")

    def record(
        self, name: str, *, about: str, seconds: float, is_root: bool = False,
        links: Iterable[str] = (), **facts: str | int | float,
    ) -> None:  # fmt: skip
        """See Tracer."""
        ended_ns = time.time_ns()
        linked = [self._api.Link(self._context(other)) for other in list(links)[:_MAX_LINKS]]
        if is_root and (caller := _TRACEPARENT.fullmatch(CALLER.get())):
            linked.append(self._api.Link(self._remote(int(caller[1], 16), int(caller[2], 16))))
        options: dict[str, Any] = {
            "links": linked,
            "attributes": {f"synthrep.{key}": value for key, value in facts.items()},
            "start_time": ended_ns - int(max(0.0, seconds) * 1e9),
        }
        if is_root:
            span = self._ids.use(ids_of(about), lambda: self._tracer.start_span(name, **options))
        else:
            parent = self._api.NonRecordingSpan(self._context(about))
            context = self._api.set_span_in_context(parent)
            span = self._tracer.start_span(name, context=context, **options)
        span.end(ended_ns)

    def _context(self, about: str) -> Any:
        return self._remote(*ids_of(about))

    def _remote(self, trace_id: int, span_id: int) -> Any:
        sampled = self._api.TraceFlags(self._api.TraceFlags.SAMPLED)
        return self._api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=sampled)


class _Ids:
    """Ids for the SDK: those that are to be used, else random ones."""

    def __init__(self) -> None:
        self._wanted = threading.local()

    def use(self, ids: tuple[int, int], make: Any) -> Any:
        """What `make` makes, with this trace id and span id."""
        self._wanted.ids = ids
        try:
            return make()
        finally:
            self._wanted.ids = None

    def generate_trace_id(self) -> int:
        """See opentelemetry.sdk.trace.IdGenerator."""
        return self._ids()[0]

    def generate_span_id(self) -> int:
        """See opentelemetry.sdk.trace.IdGenerator."""
        return self._ids()[1]

    def is_trace_id_random(self) -> bool:
        """See opentelemetry.sdk.trace.IdGenerator: hashes are as good as random."""
        return True

    def _ids(self) -> tuple[int, int]:
        ids: tuple[int, int] | None = getattr(self._wanted, "ids", None)
        return ids or ids_of(os.urandom(16).hex())


def ids_of(about: str) -> tuple[int, int]:
    """The trace id and the root span's id of the trace about what has this id."""
    digest = hashlib.sha256(f"synthrep trace {about}".encode()).digest()
    return int.from_bytes(digest[:16], "big") or 1, int.from_bytes(digest[16:24], "big") or 1


def make_tracer(service: str) -> Tracer:
    """What OTEL_… asks for; tracing that cannot be is worth a warning and no more."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return NoTracer()
    try:
        return OtlpTracer(service)
    except (ImportError, ValueError) as error:
        _log.warning("traces_not_exported", extra={"error": str(error)})
        return NoTracer()
