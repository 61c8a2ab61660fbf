"""Trackers see every step once, go on after a restart, and cannot end a run."""

from __future__ import annotations

import logging
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synthrep_trainer.trackers import TrackedRun, make_trackers


@pytest.fixture
def run(tmp_path):
    def run(step=0):
        return TrackedRun("r1", "birds", tmp_path, step, {"lr": 0.1})

    return run


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars(name)]


def test_tensorboard_shows_each_step_once_after_a_restart(run, tmp_path):
    for step, value in ((0, 1.0), (2, 2.0)):  # cut off after step 4, saved at step 2
        trackers = make_trackers(run(step))
        for later in range(step + 1, step + 5):
            trackers.log(later, {"loss": value, "terms/x": 0.5})
        trackers.close()
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path, "loss") == expected
    assert len(scalars(tmp_path, "terms/x")) == 6


class FakeWandb(types.ModuleType):
    """Notes what is asked of it; fails from a step on."""

    def __init__(self, fails_at=99):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0
        self.fails_at = fails_at

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, *, step):
        if step >= self.fails_at:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_numbers_offline_under_the_runs_id(run, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = make_trackers(run(), wandb_project="p")
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    options = wandb.started[0]
    assert (options["id"], options["resume"], options["mode"]) == ("r1", "allow", "offline")
    assert options["dir"] == str(tmp_path)
    assert wandb.logged == [(1, {"loss": 1.0})]
    assert wandb.finished == 1


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(run, tmp_path, monkeypatch, caplog):
    wandb = FakeWandb(fails_at=2)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = make_trackers(run(), wandb_project="p")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert [record.tracker for record in caplog.records] == ["wandb"]
    assert (len(wandb.logged), wandb.finished) == (1, 0)
    assert len(scalars(tmp_path, "loss")) == 3


def test_a_tracker_that_is_not_installed_is_left_out(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = make_trackers(run(), wandb_project="p")
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert "tracker_dropped" in caplog.text
    assert len(scalars(tmp_path, "loss")) == 1


class FakeMlflow:
    """A server that knows one experiment and keeps runs."""

    def __init__(self):
        self.experiment, self.runs, self.metrics, self.ended = None, [], [], 0

    def get_experiment_by_name(self, name):
        return self.experiment

    def create_experiment(self, name):
        self.experiment = types.SimpleNamespace(experiment_id="7")
        return "7"

    def search_runs(self, experiments, query):
        return self.runs if experiments == ["7"] and "'r1'" in query else []

    def create_run(self, experiment, *, run_name, tags):
        self.runs.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name + "-m")))
        return self.runs[-1]

    def log_param(self, run, name, value):
        assert (run, name, value) == ("r1-m", "lr", 0.1)

    def update_run(self, run, *, status):
        assert (run, status) == ("r1-m", "RUNNING")

    def log_batch(self, run, *, metrics):
        self.metrics += [(run, *metric[:2], metric[3]) for metric in metrics]

    def set_terminated(self, run):
        self.ended += 1


def test_mlflow_goes_on_with_the_run_that_it_has(run, monkeypatch):
    server = FakeMlflow()
    mlflow = types.ModuleType("mlflow")
    mlflow.MlflowClient = lambda tracking_uri: server
    entities, clock = types.ModuleType("mlflow.entities"), types.ModuleType("mlflow.utils.time")
    entities.Metric = lambda *fields: fields
    clock.get_current_time_millis = lambda: 5
    for module in (mlflow, entities, clock, types.ModuleType("mlflow.utils")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for step in (0, 1):
        trackers = make_trackers(run(step), mlflow_uri="http://localhost:1")
        trackers.log(step + 1, {"loss": 2.0})
        trackers.close()
    assert len(server.runs) == 1
    assert server.metrics == [("r1-m", "loss", 2.0, 1), ("r1-m", "loss", 2.0, 2)]
    assert server.ended == 2
