"""What a step leaves behind: a line of metrics, and a checkpoint when one is due."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

from synthrep_shared.storage import publish_bytes
from synthrep_trainer import distributed
from synthrep_trainer.checkpoint import save_checkpoint
from synthrep_trainer.checkpoint_folders import retire_checkpoints
from synthrep_trainer.learner import Learner, StepResult
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.runs import RunFolder
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.shard_stream import Cursor, ShardStream
from synthrep_trainer.trackers import TrackedRun, Trackers, make_trackers

_log = logging.getLogger(__name__)


class RunRecorder:
    """Writes the metrics and checkpoints of a run; on other ranks than 0 it does nothing.

    A context manager: the metrics of steps after `step` are dropped on the way in.
    """

    def __init__(
        self, folder: RunFolder, settings: TrainerSettings, learner: Learner, stream: ShardStream,
        *, step: int, watch: Callable[[StepMetrics], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`watch` is told of every step on rank 0."""
        self._folder, self._settings = folder, settings
        self._record, self._learner, self._stream = folder.record, learner, stream
        self._step, self._watch = step, watch
        self._metrics: MetricsWriter | None = None
        self._trackers: Trackers | None = None
        self._last_step_at = 0.0
        self._knn_accuracy: float | None = None  # since the last checkpoint
        self._said = ""  # what the run waits for, as the API has it

    def __enter__(self) -> Self:
        if distributed.rank() == 0:
            self._folder.waiting.unlink(missing_ok=True)  # of a process that was killed
            self._metrics = MetricsWriter(self._folder.metrics, step=self._step)
            self._trackers = self._make_trackers()
        self._last_step_at = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()

    def record_wait(self) -> None:
        """Say what the next batch waits for; a file is written when that has other words."""
        self._say(self._stream.waiting_for)

    def record_step(self, step: int, result: StepResult, *, wait_s: float) -> None:
        """Append the step's line, and give its numbers to the trackers."""
        now = time.monotonic()
        self._say("")
        if result.knn_accuracy is not None:
            self._knn_accuracy = result.knn_accuracy
        if self._metrics is not None and self._trackers is not None:
            metrics = self._step_metrics(step, result, wait_s=wait_s, now=now)
            self._metrics.write(metrics)
            self._watch(metrics)
            self._trackers.log(step, metrics.numbers())
        self._last_step_at = now

    def save(self, step: int, cursor: Cursor) -> None:
        """Write the checkpoint of a step, and delete those that are not kept."""
        parts = self._learner.parts()  # of all ranks, where they are sharded
        if self._metrics is None:
            return
        state = {
            "cursor": cursor,
            "images_seen": step * self._record.views_per_step,
            "encoder": dataclasses.asdict(self._learner.config.encoder),
            "request": self._record.request.model_dump(mode="json"),
        }
        path = save_checkpoint(
            self._folder.checkpoints, step, parts, state, knn_accuracy=self._knn_accuracy
        )
        self._knn_accuracy = None
        retire_checkpoints(
            self._folder.checkpoints,
            step=step,
            keep=self._settings.keep_checkpoints,
            keep_every=self._settings.keep_every_steps,
        )
        _log.info("checkpoint_saved", extra={"step": step, "path": str(path)})

    def _say(self, words: str) -> None:
        if self._metrics is None or words == self._said:
            return
        try:
            publish_bytes(words.encode(), self._folder.waiting, replace=True)
        except OSError:
            _log.warning("wait_not_said", exc_info=True)  # nothing that training needs
        else:
            self._said = words

    def _step_metrics(
        self, step: int, result: StepResult, *, wait_s: float, now: float
    ) -> StepMetrics:
        views, committed = self._record.views_per_step, self._stream.images_committed
        judged = result.health
        return StepMetrics(
            step=step,
            time=datetime.now(UTC),
            loss=_finite(result.loss),
            lr=result.lr,
            gradient_norm=_finite(result.gradient_norm),
            terms={n: v for n, v in result.terms.items() if math.isfinite(v)},
            is_skipped=result.is_skipped,
            effective_rank=judged and judged.effective_rank,
            alignment=judged and judged.alignment,
            uniformity=judged and judged.uniformity,
            knn_accuracy=result.knn_accuracy,
            images_seen=step * views,
            images_per_s=views / (now - self._last_step_at),
            wait_s=wait_s,
            images_committed=committed,
            generated_per_trained=committed / (step * views),
            shards_quarantined=self._stream.store.num_quarantined,
        )

    def _make_trackers(self) -> Trackers:
        request = self._record.request
        run = TrackedRun(
            id=self._folder.id,
            dataset=request.dataset_name,
            folder=self._folder.path,
            step=self._step,
            request=request.model_dump(mode="json"),
        )
        settings = self._settings
        return make_trackers(
            run,
            wandb_project=settings.wandb_project,
            wandb_mode=settings.wandb_mode,
            mlflow_uri=settings.mlflow_uri,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
