"""A run from its first shard to its last step: exact through kills, honest about its end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch

from synthrep_cli.stack import free_port
from synthrep_shared.messages import RunRequest
from synthrep_trainer import recorder, train
from synthrep_trainer.checkpoint_folders import list_checkpoints
from synthrep_trainer.child import DISK_FULL
from synthrep_trainer.errors import BadShardError, NonFiniteLossError, RunBusyError, RunError
from synthrep_trainer.learner import Learner
from synthrep_trainer.metrics import read_metrics
from synthrep_trainer.recorder import RunRecorder
from synthrep_trainer.records import Status
from synthrep_trainer.runs import RunFolder, Workplace, is_locked, locked
from synthrep_trainer.settings import TrainerSettings

LIMIT_S = 200


def never() -> bool:
    return False


@pytest.fixture
def settings(tmp_path):
    return TrainerSettings(
        root=tmp_path / "data", runs=tmp_path / "runs", device="cpu", threads=1, poll_s=0.005,
        keep_checkpoints=2, grace_s=0.5,
    )  # fmt: skip


@pytest.fixture
def submit(settings):
    """Submits a small run."""
    torch.set_num_threads(1)
    place = Workplace(settings.runs)

    def submit(**fields):
        values = {
            "dataset": "birds", "max_steps": 11, "image_size": 16, "captions_per_batch": 4,
            "images_per_caption": 2, "checkpoint_every": 3, "seed": 5,
        }  # fmt: skip
        return place.submit_run(RunRequest(**(values | fields)))

    return submit


def losses(folder):
    lines = read_metrics(folder.metrics, after=0, limit=10_000)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["gradient_norm"], line["lr"]) for line in lines]


class PowerCutError(Exception):
    """Ends an attempt without any of its clean-up that writes."""


@pytest.mark.parametrize("case", range(3))
def test_the_loss_curve_is_bit_equal_through_interruptions(
    shard_maker, settings, submit, monkeypatch, case
):
    dice = random.Random(case)
    objective = ["synclr", "stablerep+", "simclr"][case]
    for _ in range(3):
        shard_maker.commit(5)
    fields = {"objective": objective, "drop_path_rate": 0.2, "micro_batch_images": 4}
    whole, cut = submit(**fields), submit(**fields)
    assert train.run(whole, settings, never)
    record_step, save = RunRecorder.record_step, RunRecorder.save

    def record_or_die(self, step, result, *, wait_s):
        record_step(self, step, result, wait_s=wait_s)
        if dice.random() < 0.15:
            raise PowerCutError

    def save_or_die(self, step, cursor):
        if dice.random() < 0.15:
            raise PowerCutError
        save(self, step, cursor)

    monkeypatch.setattr(RunRecorder, "record_step", record_or_die)
    monkeypatch.setattr(RunRecorder, "save", save_or_die)
    attempts = 0
    while attempts < 100:
        attempts += 1
        try:
            if train.run(cut, settings, lambda: dice.random() < 0.1):
                break
        except PowerCutError:
            continue
    assert attempts > 1
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 11


@pytest.fixture
def start(settings):
    """Starts the train process, as the launcher does, or through `launch`; leaves none behind."""
    started = []

    def start(folder, *launch):
        started.append(start_process(folder, settings, *launch))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def start_process(folder, settings, *launch):
    environment = os.environ | {
        f"SYNTHREP_TRAINER_{name.upper()}": str(getattr(settings, name))
        for name in ("root", "runs", "device", "threads", "poll_s", "grace_s")
    }
    return subprocess.Popen(
        [sys.executable, "-m", *launch, "synthrep_trainer.train", "--run", str(folder.path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_step(folder, step):
    deadline = time.monotonic() + LIMIT_S
    while not read_metrics(folder.metrics, after=step - 1, limit=1):
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.005)


def test_kill_9_and_sigterm_leave_the_curve_as_it_was(shard_maker, settings, submit, start):
    shard_maker.commit(9)
    whole, cut = submit(max_steps=24), submit(max_steps=24)
    killed = start(cut)
    wait_for_step(cut, 7)
    killed.kill()
    killed.wait()
    stopped = start(cut)
    wait_for_step(cut, 14)
    stopped.terminate()
    assert stopped.wait(LIMIT_S) == 0
    newest = list_checkpoints(cut.checkpoints)[-1].step
    assert newest == len(losses(cut)) < 24
    assert train.run(cut, settings, never)
    assert train.run(whole, settings, never)
    assert losses(cut) == losses(whole)


def test_training_begins_before_the_last_shard(shard_maker, settings, submit):
    run = submit(max_steps=20, max_uses_per_image=10)
    shard_maker.commit(4)

    def generate():
        for _ in range(4):
            wait_for_step(run, 1)
            shard_maker.commit(4)

    generator = threading.Thread(target=generate)
    generator.start()
    assert train.run(run, settings, never)
    generator.join()
    lines = read_metrics(run.metrics, after=0, limit=100)
    assert lines[0]["images_committed"] == 12
    assert lines[-1]["images_committed"] == 60
    assert lines[-1]["generated_per_trained"] == pytest.approx(60 / (20 * 8))


@pytest.mark.parametrize("objective", ["stablerep", "stablerep+", "simclr", "clip", "synclr"])
def test_training_lowers_the_loss(shard_maker, settings, submit, objective):
    for _ in range(3):
        shard_maker.commit(8)
    run = submit(
        objective=objective, max_steps=30, captions_per_batch=12, checkpoint_every=30, lr=5e-4
    )
    assert train.run(run, settings, never)
    curve = [loss for loss, _, _ in losses(run)]
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.1


def test_held_out_captions_are_looked_at_and_never_trained_on(shard_maker, settings, submit):
    for _ in range(4):
        shard_maker.commit(10)
    run = submit(knn_every=4, knn_held_out=0.3, knn_captions=8, objective="clip")
    assert train.run(run, settings, never)
    lines = read_metrics(run.metrics, after=0, limit=100)
    assert [line["step"] for line in lines if line["knn_accuracy"] is not None] == [4, 8]
    # A caption's images have one colour, so even an untrained encoder beats chance, 2 / 23.
    assert 0.2 < lines[3]["knn_accuracy"] <= 1
    at = {6: lines[3]["knn_accuracy"], 9: lines[7]["knn_accuracy"], 11: None}
    best = 6 if at[6] > at[9] else 9
    kept = {c.step: c.manifest.knn_accuracy for c in list_checkpoints(run.checkpoints)}
    assert kept == {step: at[step] for step in {best, 9, 11}}


def test_a_stop_while_waiting_for_shards_ends_the_run_at_once(settings, submit):
    run = submit()
    started = time.monotonic()
    assert not train.run(run, settings, lambda: time.monotonic() > started + 0.2)
    assert time.monotonic() < started + 5
    assert losses(run) == []


def test_a_run_says_what_it_waits_for_until_it_comes(shard_maker, settings, submit, monkeypatch):
    monkeypatch.setattr("synthrep_trainer.loop._SAY_AFTER_S", 0.0)
    written = []
    write = recorder.publish_bytes
    monkeypatch.setattr(
        recorder,
        "publish_bytes",
        lambda *args, **named: written.append(args) or write(*args, **named),
    )
    run = submit(max_steps=2)
    run.write_status(Status(state="running"))
    shard_maker.commit(3)
    asked = []

    def stop() -> bool:
        words = run.waiting.read_text() if run.waiting.exists() else ""
        if words == "captions: 3 of 4 are there" and not asked:
            asked.append(words)
            shard_maker.commit(5)
        return False

    assert train.run(run, settings, stop)
    assert asked
    assert run.waiting.read_text() == ""
    assert len(written) == 2  # the words, and their end


def test_checkpoints_come_when_due_and_at_the_end(shard_maker, settings, submit, monkeypatch):
    shard_maker.commit(6)
    saved = []
    save = RunRecorder.save

    def note(self, step, cursor):
        saved.append(step)
        save(self, step, cursor)

    monkeypatch.setattr(RunRecorder, "save", note)
    run = submit()
    assert train.run(run, settings, never)
    assert saved == [3, 6, 9, 11]
    assert [c.step for c in list_checkpoints(run.checkpoints)] == [9, 11]


def test_figures_are_shown_while_it_trains(shard_maker, settings, submit):
    shard_maker.commit(12)
    run, port = submit(max_steps=3), free_port()
    texts = []

    def scrape() -> bool:
        texts.append(httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text)
        return False

    assert train.run(run, settings.model_copy(update={"metrics_port": port - 1}), scrape)
    labels = f'{{rank="0",run="{run.id}"}}'
    assert f"synthrep_trainer_process_steps_total{labels} 0.0" in texts[0]
    assert f"synthrep_trainer_process_steps_total{labels} 2.0" in texts[-1]
    assert f"synthrep_trainer_process_images_total{labels} 16.0" in texts[-1]


def test_a_completed_run_has_nothing_left_to_do(shard_maker, settings, submit):
    shard_maker.commit(6)
    run = submit(max_steps=3)
    assert train.run(run, settings, never)
    before = losses(run)
    assert train.run(run, settings, never)
    assert losses(run) == before


def test_a_loss_that_is_no_number_stops_before_the_optimizer(
    shard_maker, settings, submit, monkeypatch
):
    shard_maker.commit(6)
    run = submit()
    step = Learner.step

    def poisoned(self, batch, **kwargs):
        if kwargs["step"] == 8:
            with torch.no_grad():
                next(self._objective.projection.parameters()).fill_(float("nan"))
        return step(self, batch, **kwargs)

    monkeypatch.setattr(Learner, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match="step 8"):
        train.run(run, settings, never)
    assert len(losses(run)) == 7
    assert [c.step for c in list_checkpoints(run.checkpoints)] == [3, 6]


def test_a_shard_that_changed_is_left_out_when_the_run_goes_on(shard_maker, settings, submit):
    shard_maker.commit(8)
    record = shard_maker.commit(2)
    run = submit(max_steps=9)
    stops = iter([False] * 5)
    assert not train.run(run, settings, lambda: next(stops, True))
    (shard_maker.paths.shards / record.name).write_bytes(bytes(record.bytes))
    with pytest.raises(BadShardError, match="sha256"):
        train.run(run, settings, never)
    assert train.run(run, settings, never)
    assert read_metrics(run.metrics, after=8, limit=1)[0]["shards_quarantined"] == 1


@pytest.fixture
def call_main(monkeypatch, settings):
    """Calls the entry point in this process; gives its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(folder):
        monkeypatch.setattr(sys, "argv", ["train", "--run", str(folder.path)])
        for name in ("root", "runs", "device", "threads", "grace_s"):
            monkeypatch.setenv(f"SYNTHREP_TRAINER_{name.upper()}", str(getattr(settings, name)))
        try:
            train.main()
        except SystemExit as exit:
            return exit.code
        return 0

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "resnet50"}, "ViT of timm"),
        ({"model": "no_such_model"}, "ViT of timm"),
        ({"image_size": 17}, "multiple of the patch"),
    ],
)
def test_what_cannot_be_built_fails_for_good_and_says_why(submit, call_main, fields, words):
    run = submit(**fields)
    assert call_main(run) == 1
    assert words in run.failure.error
    assert run.failure.is_permanent


def test_a_full_disk_says_so_by_its_exit_status(submit, call_main, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(train, "run", full)
    assert call_main(submit()) == DISK_FULL
    monkeypatch.setattr(RunFolder, "write_failure", full)
    assert call_main(submit()) == DISK_FULL


def test_the_first_last_words_stand_and_come_before_other_ranks_fail_of_it(
    submit, call_main, monkeypatch
):
    run = submit()

    @contextlib.contextmanager
    def process_group(**_):
        try:
            yield
        except RunError:
            assert run.failure.is_permanent
            raise RuntimeError("connection reset by peer") from None

    def refuse(*_):
        raise RunError("refused")

    monkeypatch.setattr(train.distributed, "process_group", process_group)
    monkeypatch.setattr(train, "run", refuse)
    assert call_main(run) == 1
    assert run.failure.error == "RunError: refused"


@pytest.mark.long
def test_ranks_end_with_a_torchrun_that_is_killed(shard_maker, settings, submit, start):
    shard_maker.commit(11)
    run = submit(max_steps=100_000, max_uses_per_image=10**6)
    agent = start(
        run, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "--"
    )
    wait_for_step(run, 2)
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + LIMIT_S
    while is_locked(run.path / "train.lock"):
        assert time.monotonic() < deadline, "a rank trains on"
        time.sleep(0.05)
    assert list_checkpoints(run.checkpoints)[-1].step == len(losses(run))


def test_a_run_is_trained_by_one_process_at_a_time(shard_maker, submit, call_main):
    run = submit()
    with locked(run.path / "train.lock"):
        assert call_main(run) == 1
    assert run.failure.error.startswith(RunBusyError.__name__)
    assert not run.failure.is_permanent


def test_two_ranks_learn_what_one_does(shard_maker, settings, submit, start):
    shard_maker.commit(11)
    fields = {"max_steps": 4, "objective": "simclr", "captions_per_batch": 8, "lr": 1e-4}
    alone, shared = submit(**fields), submit(**fields)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "--"]
    assert start(shared, *torchrun).wait(LIMIT_S) == 0
    assert train.run(alone, settings, never)
    assert losses(alone)[0] == pytest.approx(losses(shared)[0], rel=1e-4)
    # Adam's first updates turn rounding of the smallest gradients into whole steps.
    for one, two in zip(losses(alone), losses(shared), strict=True):
        assert one[0] == pytest.approx(two[0], rel=0.01)
    state = json.loads((list_checkpoints(shared.checkpoints)[-1].path / "state.json").read_text())
    assert state["images_seen"] == 4 * alone.record.views_per_step
