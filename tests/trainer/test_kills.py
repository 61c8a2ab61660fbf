"""Real processes killed at random moments: training goes on as if nothing had happened.

Children are forked from a server that has imported torch already, so that hundreds of them are
cheap; each is a process of its own that nothing but its files survives.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

import pytest

from synthrep_shared.failpoints import EXIT_STATUS, TRAINER_NAMES
from synthrep_shared.messages import RunRequest
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer import distributed
from synthrep_trainer.checkpoint_folders import list_checkpoints
from synthrep_trainer.metrics import read_metrics
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.runs import RunFolder, Workplace
from synthrep_trainer.shard_stream import Cursor, ShardStream

LIMIT_S = 120.0
_KILLED = -9
_STEPS_AFTER_CHECKPOINT = 4


@pytest.fixture(scope="module")
def spawn():
    """Starts a function in a process of its own, with further environment variables."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["synthrep_trainer.train"])
    started = []

    def spawn(function, *args, **environment):
        process = context.Process(target=_child, args=(environment, function, *args), daemon=True)
        process.start()
        started.append(process)
        return process

    yield spawn
    for process in started:
        process.kill()
        process.join()


def _child(environment, function, *args):
    os.environ.update(environment)
    silent = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    function(*args)


def train_run(path):
    """What `python -m synthrep_trainer.train --run PATH` does."""
    from synthrep_trainer import train

    sys.argv = ["train", "--run", path]
    train.main()


def wait_for_step(folder: RunFolder, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while last_step(folder) < step:
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.002)


def curve(folder: RunFolder):
    lines = read_metrics(folder.metrics, after=0, limit=100_000)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["gradient_norm"], line["lr"]) for line in lines]


def last_step(folder: RunFolder) -> int:
    lines = read_metrics(folder.metrics, after=0, limit=100_000)
    return lines[-1]["step"] if lines else 0


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_kill_9_at_random_moments_leaves_the_curve_as_it_was(shard_maker, tmp_path, spawn, kills):
    """Two in three kills come from outside, one in three inside the write of a checkpoint."""
    dice = random.Random(kills)
    shard_maker.commit(9)
    environment = {
        "SYNTHREP_TRAINER_ROOT": str(shard_maker.paths.root),
        "SYNTHREP_TRAINER_RUNS": str(tmp_path / "runs"),
        "SYNTHREP_TRAINER_DEVICE": "cpu",
        "SYNTHREP_TRAINER_THREADS": "1",
        "SYNTHREP_TRAINER_POLL_S": "0.005",
        "SYNTHREP_TRAINER_KEEP_CHECKPOINTS": "2",
    }
    steps = (_STEPS_AFTER_CHECKPOINT + 3) * kills + 10
    place = Workplace(tmp_path / "runs")
    request = RunRequest(
        dataset="birds", max_steps=steps, image_size=16, captions_per_batch=4,
        images_per_caption=2, checkpoint_every=3, seed=5, max_uses_per_image=10_000,
    )  # fmt: skip
    whole, cut = place.submit_run(request), place.submit_run(request)
    names = sorted(TRAINER_NAMES)
    for number in range(kills):
        if number % 3 == 2:
            point = {
                "SYNTHREP_FAILPOINT": names[number // 3 % len(names)],
                "SYNTHREP_FAILPOINT_MARKER": str(tmp_path / f"marker-{number}"),
            }
            process = spawn(train_run, str(cut.path), **environment, **point)
            process.join(LIMIT_S)
            assert process.exitcode == EXIT_STATUS
            continue
        process = spawn(train_run, str(cut.path), **environment)
        target = last_step(cut) + dice.randint(0, _STEPS_AFTER_CHECKPOINT)
        wait_for_step(cut, target)
        time.sleep(0.3 * dice.random())
        process.kill()
        process.join()
        assert process.exitcode == _KILLED
    for folder in (cut, whole):
        process = spawn(train_run, str(folder.path), **environment)
        process.join(LIMIT_S + steps)
        assert process.exitcode == 0, folder.failure
    assert len(curve(whole)) == steps
    assert curve(cut) == curve(whole)
    first, second = (list_checkpoints(folder.checkpoints)[-1] for folder in (cut, whole))
    assert first.manifest.files["encoder.safetensors"] == second.manifest.files[
        "encoder.safetensors"
    ]  # fmt: skip


def draw_rows(root, run, plan, step, cursor, out):
    """One rank: writes a line for each batch, in step with the other ranks."""
    with distributed.process_group(timeout_s=30), Path(out).open("a", buffering=1) as lines:
        stream = ShardStream(
            DatasetPaths(Path(root), "birds"), Path(run), SamplingPlan(**plan), step=step,
            cursor=Cursor.from_json(cursor), rank=distributed.rank(),
            world_size=distributed.world_size(), poll_s=0.005, verify_s=0.02,
        )  # fmt: skip
        distributed.barrier()
        while True:
            batch = stream.next_batch(lambda: False)
            distributed.barrier()
            rows = [[g.row, g.group, g.caption_id, g.images] for g in batch.groups]
            lines.write(json.dumps([batch.step, rows, batch.cursor]) + "\n")


def read_rows(files):
    """(step, rows of all ranks, cursor) of the batches that every rank wrote down."""
    ranks = []
    for file in files:
        text = file.read_text() if file.exists() else ""
        ranks.append([json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()])
    for parts in zip(*ranks, strict=False):
        assert len({json.dumps([step, cursor]) for step, _, cursor in parts}) == 1
        yield parts[0][0], sorted(row for _, rows, _ in parts for row in rows), parts[0][2]


def start_ranks(spawn, world_size, *args, files):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE"] = str(world_size)
    return [
        spawn(draw_rows, *args, str(file), **environment, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, file in enumerate(files)
    ]


@pytest.mark.parametrize(
    "case", [0, *(pytest.param(case, marks=pytest.mark.long) for case in range(1, 5))]
)
def test_order_survives_kills_of_real_ranks(shard_maker, tmp_path, spawn, case):
    """One rank, two, one: killed at random while shards appear at random."""
    dice = random.Random(case)
    run, steps = tmp_path / "run", 24
    run.mkdir()
    plan = {
        "seed": case, "captions_per_batch": 6, "images_per_caption": 2, "min_fill_groups": 8,
        "max_uses_per_image": 8,
    }  # fmt: skip
    seen, saved = {}, (0, [-1, 0, []])
    for attempt, world_size in enumerate((1, 2, 1)):
        files = [tmp_path / f"rows-{attempt}-{rank}" for rank in range(world_size)]
        start = saved[0]
        args = (str(shard_maker.paths.root), str(run), plan, *saved)
        processes = start_ranks(spawn, world_size, *args, files=files)
        target = start + steps // 3 + dice.randint(0, 4)
        deadline = time.monotonic() + LIMIT_S
        while (max((row[0] for row in read_rows(files)), default=0)) < target:
            assert time.monotonic() < deadline
            shard_maker.commit(dice.randint(1, 5), images=dice.randint(1, 4))
            time.sleep(0.05 * dice.random())
        for process in processes:
            process.kill()
            process.join()
        batches = list(read_rows(files))
        for step, rows, _ in batches:
            assert seen.setdefault(step, rows) == rows, "a repeated step saw something else"
        step, _, cursor = batches[-dice.randint(1, 3)]
        saved = (step, cursor)
    with_no_kill = ShardStream(shard_maker.paths, run, SamplingPlan(**plan))
    assert len(seen) >= 20
    for step in sorted(seen):
        batch = with_no_kill.next_batch(lambda: False)
        rows = [[g.row, g.group, g.caption_id, g.images] for g in batch.groups]
        assert (batch.step, rows) == (step, seen[step])
