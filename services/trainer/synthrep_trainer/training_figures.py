"""What a train process has done since it started, for Prometheus, read when it is asked.

`metrics.jsonl` stays the record, and what the API shows of a run comes from there. Here is what
that lacks: totals to take rates of, waits, the device's memory, and ranks other than 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from synthrep_shared.exposition import make_registry
from synthrep_trainer.metrics import StepMetrics

_PREFIX = "synthrep_trainer_process_"
_NAN = float("nan")
_NEWEST = {
    "step": "Newest step.",
    "loss": "Loss of the newest step; NaN where it was no number.",
    "lr": "Learning rate of the newest step.",
    "gradient_norm": "Norm of the newest step's gradient before it was clipped.",
    "images_per_s": "Views a second in the newest step, waiting included.",
    "generated_per_trained": "Images committed for each view trained on.",
}


class Waits(Protocol):
    """How a stream waited for the ratio of images committed to views trained on."""

    @property
    def ratio_waits(self) -> int: ...
    @property
    def ratio_wait_s(self) -> float: ...


class Pauses(Protocol):
    """How often a governor had the generator pause."""

    @property
    def pauses(self) -> int: ...


class TrainingFigures(Collector):
    """The series of one rank of a run; steps are told to rank 0."""

    def __init__(self, run: str, device: torch.device, *, rank: int, stream: Waits) -> None:
        self._labels, self._device, self._stream = [run, str(rank)], device, stream
        self.governor: Pauses | None = None
        self._newest: StepMetrics | None = None
        self._effective_rank: float | None = None
        self._totals = dict.fromkeys(("steps", "images", "wait_seconds", "skipped_steps"), 0.0)
        self.registry = make_registry()
        self.registry.register(self)

    def take(self, step: StepMetrics) -> None:
        """Count a step in."""
        self._newest = step
        self._totals["steps"] += 1
        self._totals["images"] += step.images_seen / step.step
        self._totals["wait_seconds"] += step.wait_s
        self._totals["skipped_steps"] += step.is_skipped
        if step.effective_rank is not None:
            self._effective_rank = step.effective_rank

    def collect(self) -> Iterator[Metric]:
        """The families, fresh."""
        yield self._total("steps", "Steps taken.", self._totals["steps"])
        yield self._total("images", "Image views trained on.", self._totals["images"])
        waited_s = self._totals["wait_seconds"]
        yield self._total("wait_seconds", "Time that steps waited for their batch.", waited_s)
        skipped = self._totals["skipped_steps"]
        yield self._total("skipped_steps", "Steps whose loss or gradient was no number.", skipped)
        waits, wait_s = self._stream.ratio_waits, self._stream.ratio_wait_s
        yield self._total("ratio_waits", "Batches held back by the ratio to be kept.", waits)
        yield self._total("ratio_wait_seconds", "Time for which they were held back.", wait_s)
        pauses = 0 if self.governor is None else self.governor.pauses
        yield self._total("generation_pauses", "Times that generation was paused.", pauses)
        yield from self._of_the_newest_step()
        yield self._memory()

    def _total(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, text, labels=["run", "rank"])
        family.add_metric(self._labels, value)
        return family

    def _of_the_newest_step(self) -> Iterator[Metric]:
        newest = self._newest
        for name, text in _NEWEST.items():
            series = _PREFIX + name.replace("_per_s", "_per_second")
            family = GaugeMetricFamily(series, text, labels=["run", "rank"])
            if newest is not None:
                value = getattr(newest, name)
                family.add_metric(self._labels, _NAN if value is None else value)
            yield family
        text = "Effective rank of the features, where it was measured last."
        family = GaugeMetricFamily(_PREFIX + "effective_rank", text, labels=["run", "rank"])
        if self._effective_rank is not None:
            family.add_metric(self._labels, self._effective_rank)
        yield family

    def _memory(self) -> Metric:
        text = "Memory of the GPU: held by tensors, kept by torch, and the most held so far."
        family = GaugeMetricFamily(
            _PREFIX + "device_memory_bytes", text, labels=["run", "rank", "kind"]
        )
        if self._device.type == "cuda":
            kinds = {
                "allocated": torch.cuda.memory_allocated(self._device),
                "reserved": torch.cuda.memory_reserved(self._device),
                "peak": torch.cuda.max_memory_allocated(self._device),
            }
            for kind, size in kinds.items():
                family.add_metric([*self._labels, kind], size)
        return family
