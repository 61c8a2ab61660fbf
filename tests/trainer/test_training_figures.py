"""A train process's series: totals of its steps, its waits, its governor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import torch

from synthrep_trainer.metrics import StepMetrics
from synthrep_trainer.training_figures import TrainingFigures

_LABELS = {"run": "r1", "rank": "0"}


@dataclass
class Stream:
    ratio_waits: int = 0
    ratio_wait_s: float = 0.0


@dataclass
class Governor:
    pauses: int = 0


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def figures(stream) -> TrainingFigures:
    return TrainingFigures("r1", torch.device("cpu"), rank=0, stream=stream)


def step(number: int, **changes) -> StepMetrics:
    whole = StepMetrics(
        step=number, time=datetime.now(UTC), loss=5 / number, lr=0.1, gradient_norm=1.0,
        effective_rank=None, images_seen=8 * number, images_per_s=9.0, wait_s=0.5,
        images_committed=40, generated_per_trained=0.25, shards_quarantined=0,
    )  # fmt: skip
    return whole.model_copy(update=changes)


def value(figures: TrainingFigures, name: str) -> float | None:
    return figures.registry.get_sample_value(f"synthrep_trainer_process_{name}", _LABELS)


def test_steps_since_the_process_started_add_up(figures):
    for number in (101, 102, 103):
        figures.take(step(number))
    assert value(figures, "steps_total") == 3
    assert value(figures, "images_total") == 24
    assert value(figures, "wait_seconds_total") == 1.5
    assert value(figures, "step") == 103
    assert value(figures, "lr") == 0.1
    assert value(figures, "images_per_second") == 9.0
    assert value(figures, "generated_per_trained") == 0.25


def test_a_skipped_step_shows_a_loss_that_is_no_number(figures):
    figures.take(step(1))
    figures.take(step(2, loss=None, gradient_norm=None, is_skipped=True))
    assert value(figures, "skipped_steps_total") == 1
    assert math.isnan(value(figures, "loss"))
    assert math.isnan(value(figures, "gradient_norm"))


def test_the_effective_rank_is_that_of_the_last_measurement(figures):
    assert value(figures, "effective_rank") is None
    figures.take(step(10, effective_rank=7.5))
    figures.take(step(11))
    assert value(figures, "effective_rank") == 7.5


def test_waits_for_the_ratio_are_read_when_asked(figures, stream):
    figures.governor = Governor()
    stream.ratio_waits, stream.ratio_wait_s, figures.governor.pauses = 2, 3.5, 4
    assert value(figures, "ratio_waits_total") == 2
    assert value(figures, "ratio_wait_seconds_total") == 3.5
    assert value(figures, "generation_pauses_total") == 4


def test_before_the_first_step_there_are_totals_alone(figures):
    assert value(figures, "steps_total") == 0
    assert value(figures, "loss") is None


def test_a_cpu_has_no_memory_of_its_own(figures):
    labels = {**_LABELS, "kind": "allocated"}
    name = "synthrep_trainer_process_device_memory_bytes"
    assert figures.registry.get_sample_value(name, labels) is None
