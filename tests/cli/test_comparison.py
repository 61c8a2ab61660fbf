"""A comparison asks for what is missing, goes on where it was, and loses no result to a failure."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from synthrep_cli import comparison
from synthrep_cli.comparison import Places, run_comparison
from synthrep_cli.comparison_config import Comparison, ComparisonError
from synthrep_cli.comparison_report import write_reports
from synthrep_cli.comparison_rows import read_rows
from synthrep_cli.main import app
from synthrep_cli.stack import StackConfig
from synthrep_shared.messages import ProbeView, RunView

FIELDS = {
    "name": "micro", "seeds": [0], "rows": ["stablerep", "simclr-real", "random-init", "pixels"],
    "generated": {"num_captions": 8, "images_per_caption": 2},
    "real": {"probe_sets": ["digits"], "max_images": 40},
    "budget": {"views": 48, "views_per_batch": 16, "views_per_caption": 2},
}  # fmt: skip
NUM_TEST, ACCURACY = 1200, {"stablerep": 0.9, "simclr": 0.5, "random_init": 0.4, "pixels": 0.3}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def packed(name: str, seed: int) -> tuple[float, str]:
    hits = np.random.default_rng([seed, len(name)]).random(NUM_TEST) < ACCURACY[name]
    return float(hits.mean()), np.packbits(hits).tobytes().hex()


class Services:
    """Both services in memory: a run is trained when it is looked at, a probe likewise."""

    def __init__(self) -> None:
        self.runs: dict[str, RunView] = {}
        self.probes: dict[str, ProbeView] = {}
        self.failing: set[str] = set()
        self.deadly = False
        self.failing_probes = 0

    def probe_datasets(self):
        return [{"name": name, "metric": metric, "error": None}
                for name, metric in (("birds", "accuracy"), ("voc", "map_11point"))]  # fmt: skip

    def train(self, request, *, idempotency_key):
        fields = {"id": idempotency_key, "state": "queued", "request": request.model_dump(),
                  "step": 0, "max_steps": request.max_steps, "images_seen": 0, "loss": None,
                  "generated_per_trained": None, "images_per_s": None, "created_at": NOW,
                  "error": None}  # fmt: skip
        return self.runs.setdefault(idempotency_key, RunView.model_validate(fields))

    def run(self, run_id):
        view = self.runs[run_id]
        is_bad = view.request["objective"] in self.failing
        changes = {"state": "failed" if is_bad else "completed", "step": view.max_steps,
                   "error": "out of memory" if is_bad else None}  # fmt: skip
        self.runs[run_id] = view.model_copy(update=changes)
        return self.runs[run_id]

    def control_run(self, run_id, verb):
        assert verb == "resume"
        self.runs[run_id] = self.runs[run_id].model_copy(update={"state": "queued", "error": None})
        return self.runs[run_id]

    def metrics(self, run_id):
        return [{"step": s, "images_seen": 16 * s, "images_per_s": 8.0, "loss": 3.0 / s}
                for s in (1, 2, 3)]  # fmt: skip

    def start_probe(self, request, *, idempotency_key):
        if self.deadly and self.probes:
            raise KeyboardInterrupt
        run = self.runs[request.run_id].request
        value, hits = packed(run["objective"], run["seed"])
        baselines = {}
        for name in ("random_init", "pixels"):
            its_value, its_hits = packed(name, run["seed"] if name == "random_init" else 0)
            baselines[name] = {"value": its_value, "ci95": (0.0, 1.0), "hits": its_hits}
        state = "failed" if len(self.probes) < self.failing_probes else "completed"
        fields = {
            "id": idempotency_key, "state": state, "request": {}, "dataset": request.dataset,
            "protocol": "linear", "metric": "accuracy", "value": value, "ci95": (0.0, 1.0),
            "n_test": NUM_TEST, "hits": hits, "created_at": NOW, "baselines": baselines,
            "per_class": [{"n_test": 1000}, {"n_test": 200}],
        }  # fmt: skip
        return self.probes.setdefault(idempotency_key, ProbeView.model_validate(fields))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class FakeStack:
    """A stack whose services are `services`."""

    services = Services()

    def __init__(self, config: StackConfig) -> None:
        self.config = config

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_ready(self):
        return None

    def check(self):
        return None

    def client(self):
        return self.services


@pytest.fixture
def services(monkeypatch) -> Services:
    monkeypatch.delenv("SYNTHREP_PROBE_DATA", raising=False)
    services = Services()
    monkeypatch.setattr(FakeStack, "services", services)
    monkeypatch.setattr(comparison, "Stack", FakeStack)
    monkeypatch.setattr(comparison, "_POLL_S", 0.0)
    monkeypatch.setattr(comparison, "gpus_here", tuple)
    monkeypatch.setattr(comparison, "submit_captions", lambda *_: [])
    monkeypatch.setattr(comparison, "wait_for_images", lambda *_: None)
    monkeypatch.setattr(comparison, "import_real", lambda *_: 40)
    return services


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "run").mkdir()
    return Places(tmp_path / "run", tmp_path / "rows.jsonl", tmp_path)


def compare(places: Places, **changes):
    config = Comparison.model_validate(FIELDS | changes)
    return run_comparison(config, places, Console(file=io.StringIO()))


def test_every_row_gets_its_line_and_baselines_come_from_the_first(services, places):
    done = compare(places)
    assert sorted(r.row for r in done.rows) == sorted(FIELDS["rows"])
    assert (done.failures, done.world, done.sets) == ([], "drawings", ["birds"])
    assert {r.row: r.cost and (r.cost.views, r.cost.train_s) for r in done.rows} == {
        "stablerep": (48, 6.0), "simclr-real": (48, 6.0), "random-init": None, "pixels": None,
    }  # fmt: skip


def test_what_has_lines_is_not_done_again_and_new_seeds_are_added(services, places):
    compare(places)
    before = places.rows.read_bytes()
    services.runs.clear()
    compare(places)
    assert not services.runs
    assert places.rows.read_bytes() == before
    done = compare(places, seeds=[0, 1])
    assert len(services.runs) == 2
    assert places.rows.read_bytes().startswith(before)
    assert [r.row for r in done.rows].count("pixels") == 1  # the same for every seed
    assert [r.row for r in done.rows].count("random-init") == 2


def test_results_on_other_test_images_are_not_mixed(services, places):
    compare(places)
    lines = places.rows.read_text().splitlines()
    smaller = json.loads(lines[0]) | {"n_test": 8, "class_sizes": [4, 4], "hits": "ff"}
    places.rows.write_text("\n".join([json.dumps(smaller), *lines[1:]]) + "\n")
    with pytest.raises(ComparisonError, match="birds has other test images than when stablerep"):
        compare(places)


def test_a_comparison_killed_between_two_runs_goes_on(services, places):
    services.deadly = True
    with pytest.raises(KeyboardInterrupt):
        compare(places)
    services.deadly = False
    done = compare(places)
    assert len(done.rows) == 4
    assert len(services.runs) == len(services.probes) == 2
    assert len(read_rows(places.rows)) == len(places.rows.read_text().splitlines())


def test_a_run_that_fails_holds_up_no_other_and_is_tried_again_next_time(services, places):
    services.failing = {"stablerep"}
    done = compare(places)
    assert [r.row for r in done.rows] == ["simclr-real", "random-init", "pixels"]
    assert done.failures == ["stablerep, seed 0: out of memory"]
    services.failing = set()
    assert compare(places).failures == []
    assert len(services.runs) == 2


def test_a_probe_that_failed_once_is_made_again(services, places):
    services.failing_probes = 2
    assert len(compare(places).rows) == 4
    assert [p.state for p in services.probes.values()].count("failed") == 2


def test_the_report_says_what_is_known_and_claims_nothing_of_one_seed(services, places):
    summary = write_reports([compare(places)], places.folder)
    report = json.loads((places.folder / "report.json").read_text())
    assert set(report["rows"][0]) == {"row", "seed", "dataset", "protocol", "metric", "value",
                                      "ci95", "n_test"}  # fmt: skip
    cells = {c["row"]: c for c in report["summary"]}
    assert set(cells["stablerep"]) == {"dataset", "row", "mean", "ci95", "best", "significant"}
    assert [row for row, c in cells.items() if c["best"]] == ["stablerep"]
    assert not any(c["significant"] for c in cells.values())
    assert summary.verdicts["birds"].is_counted
    assert "**" not in (places.folder / "report.md").read_text()
    assert any("fewer than 3 seeds" in sentence for sentence in report["statement"])
    page = (places.folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    served = places.folder / "trainer" / "comparisons" / "micro.json"
    assert json.loads(served.read_text()) == report


def test_the_best_row_is_bold_where_seeds_bear_it_out(services, places):
    write_reports([compare(places, seeds=[0, 1, 2])], places.folder)
    text = (places.folder / "report.md").read_text()
    bold = [line for line in text.splitlines() if "**" in line]
    assert len(bold) == 1
    assert bold[0].startswith("| stablerep | **89.7 [")
    assert "stablerep is better than simclr-real" in text


@pytest.mark.parametrize(("better", "is_against"), [(0.1, True), (0.9, False)])
def test_what_goes_against_the_method_is_said(services, places, monkeypatch, better, is_against):
    monkeypatch.setitem(ACCURACY, "stablerep", better)
    write_reports([compare(places, seeds=[0, 1, 2])], places.folder)
    text = (places.folder / "report.md").read_text()
    assert ("Against the method: stablerep is not above raw pixels (birds)" in text) is is_against
    assert ("another row on 1 (birds)" in text) is is_against


def test_what_rows_have_seen_of_the_sets_is_said(services, places):
    done = compare(places)
    for world, words in (("photos", "CLIP with the classes as"), ("drawings", "of the very sets")):
        write_reports([dataclasses.replace(done, world=world)], places.folder)
        assert words in (places.folder / "report.md").read_text()


def test_the_command_takes_a_file_and_fails_if_a_run_failed(services, tmp_path):
    text = (
        'name = "micro"\nseeds = [0]\nrows = ["stablerep", "pixels"]\n'
        "[budget]\nviews = 48\nviews_per_batch = 16\n[ablations.few]\nimages_per_caption = 1\n"
    )
    (tmp_path / "c.toml").write_text(text)
    command = ["compare", "--config", str(tmp_path / "c.toml"), "--folder", str(tmp_path / "run"),
               "--rows", str(tmp_path / "rows.jsonl"), "--ablations"]  # fmt: skip
    services.failing = {"stablerep"}
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "2 runs failed" in result.output
    services.failing = set()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [a["id"] for a in report["ablations"]] == ["micro-few"]
