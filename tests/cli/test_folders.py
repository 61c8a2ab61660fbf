"""Files are found where services keep them, and an error says how to name another place."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthrep_cli.folders import dataset_paths, workplace_of, workplaces
from synthrep_shared.errors import StorageError, SynthRepError
from synthrep_shared.messages import RunRequest
from synthrep_trainer.runs import Workplace

RUN = RunRequest(dataset="pets", max_steps=1)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and no variable that names another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SYNTHREP_GENERATOR_ROOT", raising=False)
    monkeypatch.delenv("SYNTHREP_TRAINER_RUNS", raising=False)
    return tmp_path


def test_a_data_set_of_up_is_found_without_an_option(here):
    (here / "runs/up/data/pets").mkdir(parents=True)
    assert dataset_paths(None, "pets").folder == Path("runs/up/data/pets")
    assert dataset_paths(None, "new", is_new=True).folder == Path("runs/up/data/new")
    (here / "runs/data/pets").mkdir(parents=True)
    assert dataset_paths(None, "pets").folder == Path("runs/data/pets")


def test_a_folder_that_is_named_is_the_only_one(here, monkeypatch):
    (here / "runs/up/data/pets").mkdir(parents=True)
    with pytest.raises(SynthRepError, match="under elsewhere; --root names"):
        dataset_paths("elsewhere", "pets")
    monkeypatch.setenv("SYNTHREP_GENERATOR_ROOT", "configured")
    with pytest.raises(SynthRepError, match="under configured; --root names"):
        dataset_paths(None, "pets")
    assert dataset_paths(None, "new", is_new=True).folder == Path("configured/new")


def test_a_data_set_that_is_nowhere_is_said_with_the_option(here):
    with pytest.raises(SynthRepError, match="no data set 'pets' under runs/data; --root names"):
        dataset_paths(None, "pets")
    with pytest.raises(StorageError):
        dataset_paths(None, "../pets")


def test_a_run_of_up_is_found_without_an_option(here):
    run = Workplace(Path("runs/up/trainer")).submit_run(RUN)
    assert workplace_of(None, run.id).run(run.id)
    assert workplaces(None)[-1].root == Path("runs/up/trainer")
    other = Workplace(Path("runs/trainer")).submit_run(RUN)
    assert workplace_of(None, other.id).root == Path("runs/trainer")


def test_a_run_that_is_nowhere_is_said_with_the_option(here, monkeypatch):
    Workplace(Path("runs/up/trainer")).submit_run(RUN)
    with pytest.raises(SynthRepError, match="in runs/trainer or runs/up/trainer; --runs names"):
        workplace_of(None, "nothing")
    monkeypatch.setenv("SYNTHREP_TRAINER_RUNS", "configured")
    with pytest.raises(SynthRepError, match="in configured; --runs names"):
        workplace_of(None, "nothing")
