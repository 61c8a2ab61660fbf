"""Probes become a curve over checkpoints and bars against what they have to beat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthrep_shared.messages import ProbeRequest
from synthrep_trainer.page.probe_charts import charts, judged_by
from synthrep_trainer.records import Status
from synthrep_trainer.runs import ProbeFolder, Workplace


class Probes:
    """Probe folders as a launcher leaves them."""

    def __init__(self, folder: Path) -> None:
        self.place = Workplace(folder)
        self.place.make_folders()

    def add(self, run: str, step: int, value: float, *, state: str = "completed") -> ProbeFolder:
        request = ProbeRequest(run_id=run, dataset="digits")
        folder = self.place.submit_probe(request, owner="ann")
        score = {"value": value, "ci95": [value - 0.02, value + 0.02]}
        baselines = {
            "random_init": {"value": 0.3, "ci95": [0.28, 0.32]},
            "pixels": {"value": 0.9, "ci95": [0.88, 0.92]},
            "majority": {"value": 0.1},
        }
        path = f"runs/{run}/checkpoints/step-{step:09d}"
        result = {"checkpoint": path, "metric": "accuracy", "n_test": 50, "baselines": baselines}
        folder.result.write_text(json.dumps(result | score))
        folder.write_status(Status(state=state))
        return folder

    def judged(self):
        found, others = judged_by(reversed(self.place.probes()))
        return found, [folder.id for folder in others]


@pytest.fixture
def probes(tmp_path):
    return Probes(tmp_path)


def test_a_run_is_drawn_over_its_checkpoints_between_its_baselines(probes):
    for step, value in ((200, 0.5), (100, 0.4), (300, 0.6)):
        probes.add("a", step, value)
    found, _ = probes.judged()
    (chart,) = charts("a", found, {})
    assert [(mark.step, mark.value, mark.x) for mark in chart.marks] == [
        (100, 0.4, 0), (200, 0.5, 50), (300, 0.6, 100),
    ]  # fmt: skip
    heights = [mark.y for mark in chart.marks]
    untrained, pixels = chart.levels
    assert untrained.y > heights[0] > heights[1] > heights[2] > pixels.y
    for mark in chart.marks:
        assert 0 <= mark.top < mark.y < mark.bottom <= 100
    assert [bar.name for bar in chart.bars] == [
        "trained, step 300", "untrained encoder", "raw pixels",
    ]  # fmt: skip
    assert (chart.majority, chart.num_test) == (0.1, 50)


def test_other_runs_are_rivals_with_their_newest_probe(probes):
    probes.add("b", 100, 0.2)
    probes.add("b", 300, 0.7)
    probes.add("c", 100, 0.8)
    probes.add("a", 100, 0.5)
    found, _ = probes.judged()
    (chart,) = charts("a", found, {"a": "stablerep", "b": "simclr"})
    assert [(bar.name, bar.value) for bar in chart.bars[3:]] == [("simclr, run b, step 300", 0.7)]


@pytest.mark.parametrize(("value", "verdict"), [(0.5, "better"), (0.1, "worse"), (0.31, "overlap")])
def test_the_verdict_follows_from_the_intervals(probes, value, verdict):
    probes.add("a", 100, value)
    found, _ = probes.judged()
    assert verdict in charts("a", found, {})[0].verdict


def test_a_checkpoint_that_was_judged_again_shows_the_newest(probes):
    probes.add("a", 100, 0.4)
    probes.add("a", 100, 0.5)
    found, _ = probes.judged()
    assert [mark.value for mark in charts("a", found, {})[0].marks] == [0.5]


def test_probes_without_a_final_result_wait(probes):
    running = probes.add("a", 100, 0.4, state="running")
    assert probes.judged() == ([], [running.id])
    running.write_status(Status(state="completed"))
    found, others = probes.judged()
    assert (len(found), others) == (1, [])


def test_a_result_that_cannot_be_read_hides_no_other(probes):
    probes.add("a", 100, 0.4)
    probes.add("a", 200, 0.5).result.write_text("{")
    found, others = probes.judged()
    assert ([one.step for one in found], others) == ([100], [])
