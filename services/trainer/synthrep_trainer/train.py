"""The train process: one run from where it stands to its end, alone or as a rank of torchrun.

    python -m synthrep_trainer.train --run RUN_FOLDER
    torchrun --nproc-per-node 8 --module -- synthrep_trainer.train --run RUN_FOLDER

Exit status 0: the last step was taken, or SIGTERM came, and a checkpoint holds what was learnt.
Otherwise `failure.json` in the run's folder says why, and whether trying again can help.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from synthrep_shared.exposition import exposed
from synthrep_shared.logs import configure_logging
from synthrep_shared.tracing import make_tracer
from synthrep_trainer import distributed, recipe
from synthrep_trainer.batches import BatchLoader
from synthrep_trainer.checkpoint import Checkpoint, load_newest
from synthrep_trainer.child import die_with_parent, exit_status_after
from synthrep_trainer.devices import choose_device
from synthrep_trainer.errors import NoCheckpointError, RunBusyError, RunError, TrainingStoppedError
from synthrep_trainer.governor import Governor
from synthrep_trainer.learner import Learner
from synthrep_trainer.loop import Plan, train
from synthrep_trainer.recorder import RunRecorder
from synthrep_trainer.records import Failure, RunRecord
from synthrep_trainer.runs import RunFolder, locked
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.shard_stream import Cursor, DrawnBatch, ShardStream
from synthrep_trainer.sources import generator_of, open_dataset, open_generator
from synthrep_trainer.training_figures import TrainingFigures
from synthrep_trainer.training_traces import TrainingTraces

_log = logging.getLogger(__name__)
_GOVERNOR_RETRIES = 2  # it asks again at its next look
_PERMANENT = (RunError, TrainingStoppedError, ValueError)


def run(folder: RunFolder, settings: TrainerSettings, should_stop: Callable[[], bool]) -> bool:
    """Train a run on this rank; whether its last step was taken.

    Raises TrainingStoppedError, BadShardError, RunError, CommitLogError, and ValueError for what
    the request asks and cannot be done.
    """
    record = folder.record
    device = choose_device(settings.device)
    config = recipe.learner_config(record, device.type)
    learner = Learner(config, device, is_compiled=settings.compile, layout=settings.layout)
    step, cursor = _restore(learner, folder)
    place = open_dataset(
        record.request,
        folder.path,
        settings,
        is_writer=distributed.rank() == 0,
        should_stop=should_stop,
    )
    traces = TrainingTraces(make_tracer("trainer"), folder.id)
    with place as (dataset, reader):
        stream = ShardStream(
            dataset,
            folder.path,
            recipe.sampling_plan(record),
            step=step,
            cursor=cursor,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            poll_s=settings.poll_s,
            verify_s=settings.verify_s,
            copy_bytes=settings.copy_bytes,
            reader=reader,
            on_shard=traces.admit,
        )
        distributed.barrier()  # see ShardStream: all are made before any of them draws
        figures = TrainingFigures(folder.id, device, rank=distributed.rank(), stream=stream)
        recorder = RunRecorder(folder, settings, learner, stream, step=step, watch=figures.take)
        pin = device.type == "cuda"
        loader = _loader(record, settings, stream, learner, pin=pin, on_batch=traces.make)
        rates_at = partial(recipe.rates, record)
        plan = Plan(step + 1, record.max_steps, record.request.checkpoint_every, rates_at)
        _log.info("training_started", extra={"run": folder.id, "step": step, "device": str(device)})
        with (
            exposed(figures.registry, settings.host, settings.metrics_ports_of_runs),
            _governor(folder, settings, stream, should_stop) as figures.governor,
            recorder,
            loader,
        ):
            return train(learner, loader, recorder, plan, should_stop=should_stop)


def _restore(learner: Learner, folder: RunFolder) -> tuple[int, Cursor]:
    """Step and cursor of the newest checkpoint, which the learner takes in; else of the start."""
    checkpoint = _load_newest_of_rank_0(folder)
    if checkpoint is None:
        return 0, Cursor()
    learner.load(checkpoint.parts)
    return checkpoint.step, Cursor.from_json(checkpoint.state["cursor"])


@contextlib.contextmanager
def _governor(
    folder: RunFolder,
    settings: TrainerSettings,
    stream: ShardStream,
    should_stop: Callable[[], bool],
) -> Iterator[Governor | None]:
    """Rank 0 holds the generator back, if the run asks for that."""
    request = folder.record.request
    if request.pause_generation_above is None or distributed.rank() > 0:
        yield None
        return
    with (
        open_generator(
            generator_of(request, settings), settings, should_stop, retries=_GOVERNOR_RETRIES
        ) as client,
        Governor(
            client,
            request.dataset_name,
            folder.path,
            lambda: stream.pressure,
            pause_above=request.pause_generation_above,
            interval_s=settings.source_poll_s,
        ) as governor,
    ):
        yield governor


def _loader(
    record: RunRecord,
    settings: TrainerSettings,
    stream: ShardStream,
    learner: Learner,
    *,
    pin: bool,
    on_batch: Callable[[DrawnBatch, float], None],
) -> BatchLoader:
    return BatchLoader(
        stream,
        recipe.view_plan(record, patch_size_px=learner.best_encoder.patch_size_px),
        last_step=record.max_steps,
        threads=settings.loader_threads,
        prefetch=settings.prefetch_batches,
        pin=pin,
        held_out=recipe.held_out_plan(record),
        on_batch=on_batch,
    )


def main() -> None:
    """Read the settings and the command line, train, and leave last words if that fails."""
    parser = argparse.ArgumentParser(prog="synthrep_trainer.train")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    folder = RunFolder(parser.parse_args().run)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if distributed.has_agent():
        die_with_parent()  # torchrun leaves its processes behind when it is killed
    settings = TrainerSettings()
    configure_logging("trainer", settings.log_level)
    _log.info("settings_read", extra={"settings": settings.model_dump(mode="json")})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        with (
            _last_words(folder),
            distributed.process_group(timeout_s=settings.rank_timeout_s),
            _last_words(folder),  # before the other ranks see that this one left, and fail of it
            _alone(folder, settings.grace_s),
        ):
            is_completed = run(folder, settings, stop.is_set)
    except Exception as error:
        _log.exception("training_failed", extra={"run": folder.id})
        sys.exit(exit_status_after(error))
    _log.info("training_ended", extra={"run": folder.id, "is_completed": is_completed})


@contextlib.contextmanager
def _last_words(folder: RunFolder) -> Iterator[None]:
    """Leaves word of what ends the block, if that is an error."""
    try:
        yield
    except Exception as error:
        is_permanent = isinstance(error, _PERMANENT) and not isinstance(error, RunBusyError)
        words = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            folder.write_failure(Failure(error=words, is_permanent=is_permanent))
        raise


def _load_newest_of_rank_0(folder: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all ranks."""
    found = load_newest(folder.checkpoints)
    step = found.step if found else 0
    if distributed.broadcast_json(step) != step:
        raise NoCheckpointError("the ranks do not see the same newest checkpoint")
    return found


@contextlib.contextmanager
def _alone(folder: RunFolder, patience_s: float) -> Iterator[None]:
    """Rank 0 holds the run's lock, after waiting for a process that is about to end."""
    if distributed.rank() > 0:
        yield
        return
    deadline = time.monotonic() + patience_s
    while True:
        with locked(folder.path / "train.lock") as is_mine:
            if is_mine:
                yield
                return
        if time.monotonic() > deadline:
            raise RunBusyError(f"another process trains {folder.id}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
    distributed.end_process()
