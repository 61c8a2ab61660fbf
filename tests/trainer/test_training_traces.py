"""Training batches point at the batches of prompts that their images were asked for in."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.shard_stream import ShardStream
from synthrep_trainer.training_traces import TrainingTraces

PLAN = SamplingPlan(
    seed=7, captions_per_batch=6, images_per_caption=2, min_fill_groups=6, max_uses_per_image=100
)


@dataclass
class Recorded:
    """A tracer that keeps what it is told."""

    is_on: bool = True
    spans: list[dict[str, Any]] = field(default_factory=list)

    def record(self, name: str, **facts: Any) -> None:
        self.spans.append({"name": name, **facts})


@pytest.mark.parametrize("is_on", [True, False])
def test_a_batch_is_linked_to_the_prompts_it_came_from(shard_maker, tmp_path, is_on, caplog):
    caplog.set_level(logging.INFO, "synthrep_trainer.admitted_log")
    records = [shard_maker.commit(6) for _ in range(2)]
    tracer = Recorded(is_on)
    traces = TrainingTraces(tracer, "run")
    stream = ShardStream(shard_maker.paths, tmp_path, PLAN, on_shard=traces.admit)
    drawn = stream.next_batch(lambda: False)
    traces.make(drawn, 0.25)
    (logged,) = caplog.records
    assert (logged.message, logged.first_seq, logged.last_seq) == ("records_admitted", 1, 2)
    if not is_on:
        assert tracer.spans == []
        return
    *admitted, made = tracer.spans
    assert [(s["name"], s["about"], s["seq"], s["shard"]) for s in admitted] == [
        ("admit shard", "b1", record.seq, record.name) for record in records
    ]
    assert made["name"] == "make training batch"
    assert made["is_root"]
    assert list(made["links"]) == ["b1"]
    assert (made["run"], made["step"], made["seconds"]) == ("run", 1, 0.25)
    assert made["captions"] == len(drawn.groups)
