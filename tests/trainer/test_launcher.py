"""The launcher's promises, kept with children that train nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer.jobs import ProbeJob, RunJob
from synthrep_trainer.launcher import Launcher
from synthrep_trainer.records import Status, Wanted
from synthrep_trainer.runs import RunFolder, Workplace, is_locked
from synthrep_trainer.settings import TrainerSettings

LIMIT_S = 120
PRELUDE = """
import os, signal, sys, time
from datetime import UTC, datetime
from pathlib import Path
from synthrep_trainer.checkpoint_folders import Manifest, publish_checkpoint
from synthrep_trainer.records import Failure
from synthrep_trainer.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
def save(step):
    manifest = Manifest(step=step, created_at=datetime.now(UTC), files={})
    publish_checkpoint(folder.checkpoints, {}, manifest)
starts = folder.path / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
count = len(starts.read_text())
"""
COMPLETE = "save(10)"
WAIT = """
signal.signal(signal.SIGTERM, lambda *_: (save(5), sys.exit(0)))
(folder.path / "ready").touch()
time.sleep(60)
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder.path / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path):
    return TrainerSettings(
        runs=tmp_path, sweep_s=0.01, max_restarts=2, grace_s=5, max_runs=2, max_probes=1
    )


@pytest.fixture
def place(settings):
    return Workplace(settings.runs)


@pytest.fixture
def child_does(monkeypatch):
    """Makes every child run a script instead of training or probing."""

    def use(script):
        def command(job):
            return [sys.executable, "-c", PRELUDE + script, str(job.folder.path)]

        monkeypatch.setattr(RunJob, "_command", command)
        monkeypatch.setattr(ProbeJob, "_command", command)

    return use


@pytest.fixture
def launcher(settings):
    launcher = Launcher(settings)
    yield launcher
    launcher.close()


def submit(place, **fields):
    return place.submit_run(RunRequest(**({"dataset": "birds", "max_steps": 10} | fields)))


def sweep_until(launcher, condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the launcher did not get there"
        launcher.sweep()
        time.sleep(0.01)


def starts(folder):
    file = folder.path / "starts"
    return len(file.read_text()) if file.exists() else 0


def test_a_run_whose_last_step_is_saved_is_completed(launcher, place, child_does):
    child_does(COMPLETE)
    run = submit(place)
    sweep_until(launcher, lambda: run.state == "completed")
    assert not is_locked(run.lease)


def test_a_crash_is_retried_and_then_relayed_with_its_last_words(launcher, place, child_does):
    child_does("print('no such device', file=sys.stderr); sys.exit(3)")
    run = submit(place)
    sweep_until(launcher, lambda: run.state == "failed")
    assert starts(run) == 3
    assert "exit status 3" in run.status.error
    assert "no such device" in run.status.error


def test_a_signal_is_named(launcher, place, child_does):
    child_does("os.kill(os.getpid(), signal.SIGSEGV)")
    run = submit(place)
    sweep_until(launcher, lambda: run.state == "failed")
    assert run.status.error.startswith("killed by SIGSEGV")


def test_a_full_disk_is_waited_out_however_long(launcher, place, child_does, monkeypatch):
    child_does("save(10) if count > 6 else sys.exit(os.EX_CANTCREAT)")
    monkeypatch.setattr("synthrep_trainer.jobs._ROOM_S", 0.01)
    run = submit(place)
    sweep_until(launcher, lambda: run.state in ("completed", "failed"))
    assert (run.state, starts(run)) == ("completed", 7)


def test_a_permanent_failure_is_not_retried(launcher, place, child_does):
    child_does("folder.write_failure(Failure(error='loss is nan', is_permanent=True)); sys.exit(1)")
    run = submit(place)
    sweep_until(launcher, lambda: run.state == "failed")
    assert (starts(run), run.status.error) == (1, "loss is nan")


def test_progress_between_crashes_renews_the_restarts(launcher, place, child_does):
    child_does("save(count); os._exit(9) if count < 10 else sys.exit(0)")
    run = submit(place)
    sweep_until(launcher, lambda: run.state in ("completed", "failed"))
    assert (run.state, starts(run)) == ("completed", 10)


def test_a_killed_train_process_is_started_again(launcher, place, child_does):
    child_does("(folder.path / 'pid').write_text(str(os.getpid()))\n" + WAIT)
    run = submit(place)
    sweep_until(launcher, (run.path / "ready").exists)
    (run.path / "ready").unlink()
    os.kill(int((run.path / "pid").read_text()), signal.SIGKILL)
    sweep_until(launcher, (run.path / "ready").exists)
    assert (run.state, starts(run)) == ("running", 2)


def test_stop_pauses_with_a_checkpoint_and_resume_goes_on(launcher, place, child_does):
    child_does(WAIT)
    run = submit(place)
    sweep_until(launcher, (run.path / "ready").exists)
    run.write_wanted(Wanted(verb="stop"))
    sweep_until(launcher, lambda: run.state == "paused")
    assert (run.checkpoints / "step-000000005").exists()
    child_does(COMPLETE)
    run.write_wanted(Wanted(verb="run", attempt=2))
    assert run.state == "queued"
    sweep_until(launcher, lambda: run.state == "completed")


def test_a_deaf_child_is_killed_past_its_grace(settings, place, child_does):
    child_does(DEAF)
    launcher = Launcher(settings.model_copy(update={"grace_s": 0.2}))
    run = submit(place)
    sweep_until(launcher, (run.path / "ready").exists)
    run.write_wanted(Wanted(verb="stop"))
    sweep_until(launcher, lambda: run.state == "paused")
    launcher.close()


def test_closing_leaves_the_run_to_the_next_launcher(settings, place, child_does):
    child_does(WAIT)
    first = Launcher(settings)
    run = submit(place)
    sweep_until(first, (run.path / "ready").exists)
    first.close()
    assert run.state == "queued"
    assert (run.checkpoints / "step-000000005").exists()
    child_does(COMPLETE)
    second = Launcher(settings)
    sweep_until(second, lambda: run.state == "completed")
    second.close()


def test_two_launchers_share_the_work(settings, place, child_does):
    child_does(WAIT)
    launchers = [Launcher(settings), Launcher(settings)]
    runs = [submit(place) for _ in range(5)]
    for _ in range(5):
        for launcher in launchers:
            launcher.sweep()
    sweep_until(launchers[0], lambda: sum((r.path / "ready").exists() for r in runs) == 4)
    assert [starts(run) for run in runs] == [1, 1, 1, 1, 0]
    assert [run.state for run in runs] == ["running"] * 4 + ["queued"]
    for launcher in launchers:
        launcher.close()


def test_a_probe_completes_with_its_result(launcher, place, child_does):
    child_does("(folder.path / 'result.json').write_text('{}')")
    probe = place.submit_probe(ProbeRequest(run_id="x", dataset="digits"))
    sweep_until(launcher, lambda: probe.state == "completed")


def test_checkpoints_call_for_probes(launcher, place, child_does):
    child_does("[(save(step), time.sleep(0.3)) for step in (2, 4, 5, 8, 10)]")
    run = submit(place, probe_every=4, probe_datasets=["digits", "emoji"])
    launcher._settings = launcher._settings.model_copy(update={"max_probes": 0})
    sweep_until(launcher, lambda: run.state == "completed")
    asked = [probe.record.request for probe in place.probes()]
    assert sorted(r.dataset for r in asked) == ["digits", "digits", "emoji", "emoji"]
    assert {r.run_id for r in asked} == {run.id}


def test_probes_that_storage_let_through_in_part_are_asked_for_once(
    launcher, place, child_does, monkeypatch
):
    child_does(COMPLETE)
    run = submit(place, probe_every=4, probe_datasets=["digits", "emoji"])
    launcher._settings = launcher._settings.model_copy(update={"max_probes": 0})
    submit_probe, calls = Workplace.submit_probe, []

    def flaky(self, request, **given):
        calls.append(request)
        if len(calls) in (2, 4):
            raise OSError(errno.ENOSPC, "full")
        return submit_probe(self, request, **given)

    monkeypatch.setattr(Workplace, "submit_probe", flaky)
    sweep_until(launcher, lambda: run.state == "completed")
    assert sorted(probe.record.request.dataset for probe in place.probes()) == ["digits", "emoji"]


@pytest.mark.parametrize("name", ["request.json", "status.json", "wanted.json"])
def test_a_file_of_another_version_does_not_stop_the_rest(launcher, place, child_does, name):
    child_does(COMPLETE)
    odd, run = submit(place), submit(place)
    (odd.path / name).write_text('{"version": 2}')
    sweep_until(launcher, lambda: run.state == "completed")
    assert starts(odd) == 0


def test_completed_requests_are_looked_at_once(launcher, place, monkeypatch):
    for _ in range(3):
        submit(place).write_status(Status(state="completed"))
    launcher.sweep()
    monkeypatch.setattr(RunFolder, "state", property(lambda folder: pytest.fail(folder.id)))
    launcher.sweep()


def test_a_file_that_turns_unreadable_stops_no_other_child(launcher, place, child_does):
    child_does(WAIT)
    odd, run = submit(place), submit(place)
    sweep_until(launcher, lambda: (odd.path / "ready").exists() and (run.path / "ready").exists())
    (odd.path / "wanted.json").write_text('{"version": 2}')
    run.write_wanted(Wanted(verb="stop"))
    sweep_until(launcher, lambda: run.state == "paused")
    assert launcher.failed_sweeps._value.get() > 0
    (odd.path / "wanted.json").unlink()


def test_a_deleted_run_ends_its_child_and_makes_room(settings, place, child_does):
    launcher = Launcher(settings.model_copy(update={"max_runs": 1}))
    child_does(DEAF)
    gone = submit(place)
    sweep_until(launcher, lambda: (gone.path / "ready").exists())
    shutil.rmtree(gone.path)
    child_does(COMPLETE)
    run = submit(place)
    sweep_until(launcher, lambda: run.state == "completed")
    launcher.close()


def test_a_run_that_storage_refuses_keeps_no_other_one_waiting(
    launcher, place, child_does, monkeypatch
):
    child_does(COMPLETE)
    refused, run = submit(place), submit(place)
    write_status = RunFolder.write_status

    def refuse(folder, status):
        if folder.id == refused.id:
            raise OSError(errno.EROFS, "read-only")
        write_status(folder, status)

    monkeypatch.setattr(RunFolder, "write_status", refuse)
    sweep_until(launcher, lambda: run.state == "completed")
    assert not is_locked(refused.lease)
    monkeypatch.setattr(RunFolder, "write_status", write_status)
    sweep_until(launcher, lambda: refused.state == "completed")


def test_closing_ends_although_no_status_can_be_written(settings, place, child_does, monkeypatch):
    launcher = Launcher(settings.model_copy(update={"grace_s": 0.1}))
    child_does(DEAF)
    run = submit(place)
    sweep_until(launcher, lambda: (run.path / "ready").exists())
    pid = launcher._jobs[0]._child.pid

    def refuse(folder, status):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(RunFolder, "write_status", refuse)
    monkeypatch.setattr("synthrep_trainer.launcher._PARTING_S", 0.5)
    launcher.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_sigterm_ends_the_launcher_and_its_children_within_the_grace(settings, place):
    environment = os.environ | {
        "SYNTHREP_TRAINER_RUNS": str(settings.runs), "SYNTHREP_TRAINER_SWEEP_S": "0.05",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "synthrep_trainer.launcher"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "launcher_started" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    process.stderr.close()
    assert process.wait(LIMIT_S) == 0


def test_ids_sort_by_time_within_a_second(place):
    runs = [submit(place) for _ in range(50)]
    assert [run.id for run in place.runs()] == [run.id for run in runs]
