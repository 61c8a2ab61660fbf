"""`GET /metrics`: numbers of the files, of Redis where it answers, and of the requests served."""

from __future__ import annotations

import time
from collections import Counter as Tallies
from collections.abc import Iterator

from fastapi import APIRouter, HTTPException, Request, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from synthrep_generator.backlog import Snapshot
from synthrep_generator.context import Context
from synthrep_generator.errors import BacklogUnknownError
from synthrep_generator.progress import DatasetIndex, utc_now
from synthrep_generator.routes_service import workers_wanted
from synthrep_shared.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    needs,
    principal_of,
    problem_answers,
)
from synthrep_shared.storage import free_bytes
from synthrep_shared.tracing import CALLER

router = APIRouter(tags=["service"])
_PREFIX = "synthrep_generator_"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ProgressCollector(Collector):
    """Reads data sets and the work in hand when asked."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        """The families, fresh."""
        indexes = self._context.catalog.datasets()
        yield from self._datasets(indexes)
        yield from self._limits(indexes)
        wanted = GaugeMetricFamily(_PREFIX + "workers_wanted", "Workers the unfinished work wants.")
        wanted.add_metric([], workers_wanted(self._context))
        yield wanted
        yield from self._redis()

    def _datasets(self, indexes: list[DatasetIndex]) -> Iterator[Metric]:
        prompts = GaugeMetricFamily(
            _PREFIX + "prompts",
            "Accepted prompts by where they are; queued ones include those in hand.",
            labels=["dataset", "state"],
        )
        counters = {
            "images": "Images committed.",
            "groups": "Groups committed.",
            "shards": "Shards sealed.",
            "bytes": "Bytes of sealed shards.",
        }
        families = {
            name: CounterMetricFamily(f"{_PREFIX}committed_{name}", text, labels=["dataset"])
            for name, text in counters.items()
        }
        accepted = CounterMetricFamily(
            _PREFIX + "accepted_prompts", "Prompts accepted.", labels=["dataset"]
        )
        for index in indexes:
            totals = index.totals()
            prompts.add_metric([index.name, "queued"], totals.unfinished)
            prompts.add_metric([index.name, "committed"], totals.committed)
            prompts.add_metric([index.name, "failed"], totals.failed)
            prompts.add_metric([index.name, "cancelled"], totals.cancelled)
            accepted.add_metric([index.name], totals.accepted)
            for name, family in families.items():
                family.add_metric([index.name], getattr(totals, name))
        yield from (prompts, accepted, *families.values())

    def _limits(self, indexes: list[DatasetIndex]) -> Iterator[Metric]:
        """What an operator is to be told of before it hurts."""
        now = utc_now()
        waits_s = [
            (now - batch.created_at).total_seconds()
            for index in indexes
            if index.totals().unfinished
            for batch in index.batches()
            if batch.unfinished
        ]
        settings = self._context.settings
        gauges = {
            "oldest_unfinished_seconds": (
                "Age of the oldest unfinished batch.",
                max(waits_s, default=0),
            ),
            "disk_free_bytes": ("Free space for files in the making.", free_bytes(settings.root)),
            "disk_reserve_bytes": ("Free space below which work waits.", settings.reserve_bytes),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(_PREFIX + name, text)
            family.add_metric([], value)
            yield family

    def _redis(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(_PREFIX + "redis_up", "Whether Redis answers.")
        try:
            snapshot = self._context.live.snapshot()
        except BacklogUnknownError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from self._work_in_hand(snapshot)

    def _work_in_hand(self, snapshot: Snapshot) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(_PREFIX + "jobs", "Jobs in Redis by state.", labels=["state"])
        jobs.add_metric(["waiting"], snapshot.queue.depth)
        jobs.add_metric(["running"], snapshot.queue.running)
        workers = GaugeMetricFamily(_PREFIX + "workers", "Live workers by state.", labels=["state"])
        for state, count in Tallies(worker.state for worker in snapshot.workers).items():
            workers.add_metric([state], count)
        speed = GaugeMetricFamily(
            _PREFIX + "workers_images_per_second", "Speed of all live workers together."
        )
        speed.add_metric([], sum(worker.images_per_s or 0.0 for worker in snapshot.workers))
        filtered = CounterMetricFamily(
            _PREFIX + "filtered_images", "Images that quality gates refused.", labels=["check"]
        )
        for check, images in snapshot.queue.filtered.items():
            filtered.add_metric([check], images)
        yield from (jobs, workers, speed, filtered)


class RequestMetrics:
    """Counts and times the requests that pass through to the app, by route, for traces too."""

    def __init__(self, app: App, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            _PREFIX + "http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            _PREFIX + "http_request_duration_seconds",
            "Time to the first byte of the answer.",
            ["route"],
            registry=registry,
            buckets=_BUCKETS_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        caller = dict(scope["headers"]).get(b"traceparent", b"")
        CALLER.set(caller.decode("latin-1"))

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Labels come from closed sets: a client cannot make new series.
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._requests.labels(method, route, str(message["status"])).inc()
                self._seconds.labels(route).observe(time.perf_counter() - started)
            await send(message)

        await self._app(scope, receive, send_and_count)


def make_registry(context: Context) -> CollectorRegistry:
    """A registry of its own for each app."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(ProgressCollector(context))
    return registry


@router.get(
    "/metrics",
    response_class=Response,
    summary="Metrics for Prometheus",
    responses={
        **problem_answers(),
        200: {
            "description": "Text exposition format",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
    },
    openapi_extra=needs("read"),
)
def metrics(request: Request) -> Response:
    """Series start with `synthrep_generator_`."""
    if not principal_of(request.scope).sees_all:
        raise HTTPException(403, "figures over everyone's work need a key of all data sets")
    return Response(generate_latest(request.app.state.registry), media_type=_MEDIA_TYPE)
