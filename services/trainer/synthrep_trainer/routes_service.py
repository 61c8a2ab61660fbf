"""Routes of the service itself: health, and numbers for Prometheus."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from fastapi import APIRouter, HTTPException, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from synthrep_shared.asgi import NEEDS_NO_KEY, needs, principal_of, problem_answers
from synthrep_shared.messages import HealthView
from synthrep_trainer.context import Context, ContextDep
from synthrep_trainer.metrics import last_metrics
from synthrep_trainer.runs import ProbeFolder
from synthrep_trainer.views import probe_view

router = APIRouter(tags=["service"])
_PREFIX = "synthrep_trainer_"
_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RUN_GAUGES = {
    "step": "Newest step.",
    "loss": "Loss of the newest step; NaN where it was no number.",
    "images_seen": "Image views trained on.",
    "images_per_s": "Image views a second in the newest step.",
    "wait_s": "Seconds that the newest step waited for its batch.",
    "generated_per_trained": "Images committed for each view trained on.",
    "shards_quarantined": "Shards that are not what the commit log says.",
}


class RunCollector(Collector):
    """Reads the runs' and probes' files when asked; numbers are those of runs that are running."""

    def __init__(self, context: Context) -> None:
        self._place = context.place

    def collect(self) -> Iterator[Metric]:
        """The families, fresh."""
        runs = self._place.runs()
        states = {folder.id: folder.state for folder in runs}
        yield self._by_state("runs", list(states.values()))
        probes = self._place.probes()
        yield self._by_state("probes", [folder.state for folder in probes])
        yield self._newest_values(probes)
        families = {
            name: GaugeMetricFamily(f"{_PREFIX}run_{name}", text, labels=["run"])
            for name, text in _RUN_GAUGES.items()
        }
        for folder in runs:
            newest = last_metrics(folder.metrics) if states[folder.id] == "running" else None
            for name, family in families.items():
                if newest is not None:
                    value = newest[name]
                    family.add_metric([folder.id], float("nan") if value is None else value)
        yield from families.values()

    def _newest_values(self, probes: list[ProbeFolder]) -> Metric:
        """Of each run, the completed probe asked for last, by what it was judged on."""
        newest: dict[tuple[str, str, str], float] = {}
        for folder in probes:
            if folder.state != "completed":
                continue
            with suppress(OSError, ValueError):  # one of another version hides no other
                view = probe_view(folder)
                if view.value is not None:
                    of_run = str(view.request.get("run_id") or "")
                    newest[of_run, view.dataset, view.protocol] = view.value
        family = GaugeMetricFamily(
            _PREFIX + "probe_value", "Newest value.", labels=["run", "dataset", "protocol"]
        )
        for labels, value in newest.items():
            family.add_metric(labels, value)
        return family

    def _by_state(self, name: str, states: list[str]) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, f"{name.title()} by state.", labels=["state"])
        for state, count in Counter(states).items():
            family.add_metric([state], count)
        return family


def make_registry(context: Context) -> CollectorRegistry:
    """A registry of its own for each app."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(RunCollector(context))
    return registry


@router.get(
    "/healthz",
    response_model=HealthView,
    summary="The process lives",
    openapi_extra=NEEDS_NO_KEY,
)
async def healthz() -> HealthView:
    """Touches no disk."""
    return HealthView(status="ok")


@router.get(
    "/readyz",
    response_model=HealthView,
    summary="The folder of runs can be written",
    responses={503: problem_answers(503)[503]},
    openapi_extra=NEEDS_NO_KEY,
)
def readyz(context: ContextDep) -> HealthView:
    """Requests are taken in, whether a launcher runs or not."""
    if not os.access(context.place.root, os.W_OK):
        headers = {"retry-after": "30"}
        raise HTTPException(503, "the folder of runs cannot be written", headers=headers)
    return HealthView(status="ok")


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
    """Series start with `synthrep_trainer_`."""
    if not principal_of(request.scope).sees_all:
        raise HTTPException(403, "figures over everyone's work need a key of all data sets")
    return Response(generate_latest(request.app.state.registry), media_type=_MEDIA_TYPE)
