"""A checkpoint is whole or is passed over, and the newest whole one is found."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from synthrep_trainer.checkpoint import load_checkpoint, load_newest, save_checkpoint
from synthrep_trainer.checkpoint_folders import (
    list_checkpoints,
    open_checkpoint,
    retire_checkpoints,
)
from synthrep_trainer.errors import NoCheckpointError

PARTS = {
    "encoder": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.bfloat16)},
    "optimizer": {"step": torch.tensor(7.0)},
}
STATE = {"cursor": [1, 2, [[3, 4]]]}


def test_tensors_and_state_come_back_as_they_were(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, STATE)
    loaded = load_checkpoint(open_checkpoint(path))
    assert (loaded.step, loaded.state) == (7, STATE)
    for part, tensors in PARTS.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.parts[part][name], tensor)
            assert loaded.parts[part][name].dtype == tensor.dtype


def test_nothing_written_is_a_pickle(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, STATE)
    names = sorted(p.name for p in path.iterdir())
    assert names == ["encoder.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("case", range(20))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, case):
    dice = random.Random(case)
    save_checkpoint(tmp_path, 1, PARTS, STATE)
    newest = save_checkpoint(tmp_path, 2, PARTS, STATE)
    victim = dice.choice(sorted(newest.iterdir()))
    data = victim.read_bytes()
    kind = dice.choice(["cut", "flip", "remove"])
    at = dice.randrange(len(data))
    victim.unlink()
    if kind == "cut":
        victim.write_bytes(data[:at])
    elif kind == "flip":
        victim.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    if victim.name == "manifest.json" and kind == "flip":
        # A flipped bit may leave a valid manifest, of another date for instance: then it verifies.
        assert load_newest(tmp_path).step in (1, 2)
    else:
        assert load_newest(tmp_path).step == 1


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert load_newest(tmp_path / "absent") is None
    (tmp_path / "step-000000009").mkdir()
    assert load_newest(tmp_path) is None


def test_a_manifest_names_files_of_its_folder_only(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, STATE)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.raises(NoCheckpointError, match="outside"):
        open_checkpoint(path)


def test_a_broken_checkpoint_is_replaced_when_its_step_is_trained_again(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, STATE)
    (path / "state.json").write_text("{")
    save_checkpoint(tmp_path, 7, PARTS, STATE)
    assert load_newest(tmp_path).step == 7


def test_old_checkpoints_go_and_those_at_multiples_stay(tmp_path):
    for step in range(1, 11):
        save_checkpoint(tmp_path, step, PARTS, STATE)
    (tmp_path / ".step-000000011.1.ff.part").mkdir()
    retire_checkpoints(tmp_path, step=10, keep=2, keep_every=4)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))
    retire_checkpoints(tmp_path, step=10, keep=1, keep_every=0)
    assert [c.step for c in list_checkpoints(tmp_path)] == [10]


def test_the_best_on_held_out_captions_stays_the_newest_of_equals(tmp_path):
    for step, accuracy in enumerate([None, 0.2, 0.6, 0.6, 0.5, None], 1):
        save_checkpoint(tmp_path, step, PARTS, STATE, knn_accuracy=accuracy)
        retire_checkpoints(tmp_path, step=step, keep=1, keep_every=0)
    assert [(c.step, c.manifest.knn_accuracy) for c in list_checkpoints(tmp_path)] == [
        (4, 0.6), (6, None),
    ]  # fmt: skip


def test_a_run_that_went_back_before_broken_checkpoints_keeps_what_it_saves(tmp_path):
    for step in (30, 40):
        (save_checkpoint(tmp_path, step, PARTS, STATE) / "state.json").write_text("{")
    for step in (10, 20):
        save_checkpoint(tmp_path, step, PARTS, STATE)
        retire_checkpoints(tmp_path, step=step, keep=1, keep_every=0)
        assert load_newest(tmp_path).step == step
    assert [c.step for c in list_checkpoints(tmp_path)] == [20, 30, 40]


def test_a_disk_that_cannot_be_read_does_not_pass_for_a_run_without_checkpoints(
    tmp_path, monkeypatch
):
    save_checkpoint(tmp_path, 7, PARTS, STATE)

    def read_bytes(path):
        raise OSError(errno.EIO, "trouble")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="trouble"):
        load_newest(tmp_path)


_SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from synthrep_trainer.checkpoint import save_checkpoint
from synthrep_trainer.checkpoint_folders import retire_checkpoints
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for step in range(1, 10_000):
    save_checkpoint(folder, step, {"encoder": {"w": torch.full((20_000,), float(step))}}, {})
    retire_checkpoints(folder, step=step, keep=2, keep_every=0)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    dice = random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    saved = 0
    try:
        for _ in range(50):
            # Stopped anywhere in a save, the folder looks as after a kill; then it goes on.
            saved = int(process.stdout.readline())
            time.sleep(dice.random() * 0.004)
            os.kill(process.pid, signal.SIGSTOP)
            found = load_newest(tmp_path)
            assert found is not None
            assert found.step >= saved
            assert torch.equal(found.parts["encoder"]["w"], torch.full((20_000,), found.step * 1.0))
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
