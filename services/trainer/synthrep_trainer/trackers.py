"""Where the numbers of a run are shown beside its own metrics: TensorBoard, W&B, MLflow.

TensorBoard's event files always lie in the run's folder. The others are optional: imported when a
setting asks for them, and never allowed to end a training run. What raises is logged and left out
from then on; `metrics.jsonl` stays the record.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_log = logging.getLogger(__name__)
_FLUSH_S = 10
_MLFLOW_RUN_TAG = "synthrep.run"

Values = Mapping[str, float]


class Tracker(Protocol):
    """Takes the numbers of steps, in order."""

    def log(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class TrackedRun(NamedTuple):
    """What a tracker is told of a run."""

    id: str
    dataset: str
    folder: Path
    step: int
    """Steps taken before; numbers of later ones are of an attempt that was cut off."""
    request: Mapping[str, Any]


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, one for each attempt."""

    def __init__(self, run: TrackedRun) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        folder = str(run.folder / "tensorboard")
        self._writer = writer(folder, purge_step=run.step + 1, flush_secs=_FLUSH_S)

    def log(self, step: int, values: Values) -> None:
        """See Tracker; returns at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases that goes on after a restart; offline unless asked to be online."""

    def __init__(self, run: TrackedRun, *, project: str, mode: str) -> None:
        self._run = importlib.import_module("wandb").init(
            project=project,
            id=run.id,
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            group=run.dataset,
            config=dict(run.request),
        )

    def log(self, step: int, values: Values) -> None:
        """See Tracker; returns at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Hand over what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow in an experiment named after the data set; blocks for each step's request."""

    def __init__(self, run: TrackedRun, *, uri: str) -> None:
        mlflow = importlib.import_module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._time_ms = importlib.import_module("mlflow.utils.time").get_current_time_millis
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(run.dataset)
        number = (
            self._client.create_experiment(run.dataset)
            if experiment is None
            else experiment.experiment_id
        )
        found = self._client.search_runs([number], f"tags.`{_MLFLOW_RUN_TAG}` = '{run.id}'")
        self._id = found[0].info.run_id if found else self._new(number, run)
        self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Values) -> None:
        """See Tracker."""
        now = self._time_ms()
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended; it goes on under the same id when it is resumed."""
        self._client.set_terminated(self._id)

    def _new(self, experiment: str, run: TrackedRun) -> str:
        tags = {_MLFLOW_RUN_TAG: run.id}
        created = self._client.create_run(experiment, run_name=run.id, tags=tags)
        for name, value in run.request.items():
            self._client.log_param(created.info.run_id, name, value)
        return str(created.info.run_id)


class Trackers:
    """Several trackers, none of which can do harm."""

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        """Makes each by its name; one that cannot be made is logged and left out."""
        self._trackers: dict[str, Tracker] = {}
        for name, make in makers.items():
            self._guard(name, partial(self._add, name, make))

    def log(self, step: int, values: Values) -> None:
        """Give a step's numbers to all."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, partial(tracker.log, step, values))

    def close(self) -> None:
        """Close all."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.close)

    def _add(self, name: str, make: Callable[[], Tracker]) -> None:
        self._trackers[name] = make()

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:
            self._trackers.pop(name, None)
            _log.warning("tracker_dropped", extra={"tracker": name}, exc_info=True)


def make_trackers(
    run: TrackedRun, *, wandb_project: str = "", wandb_mode: str = "offline", mlflow_uri: str = ""
) -> Trackers:
    """TensorBoard, and those that are asked for by a project or an address."""
    makers: dict[str, Callable[[], Tracker]] = {"tensorboard": lambda: TensorBoard(run)}
    if wandb_project:
        makers["wandb"] = lambda: WeightsAndBiases(run, project=wandb_project, mode=wandb_mode)
    if mlflow_uri:
        makers["mlflow"] = lambda: MLflow(run, uri=mlflow_uri)
    return Trackers(makers)
