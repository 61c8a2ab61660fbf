"""`synthrep dataset verify` and `repair`, from the command line to the files."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_shared.commit_log import CommitLog
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.storage import DatasetPaths


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetPaths:
    """A data set with one recorded failure and one undecided prompt, under the settings' root."""
    monkeypatch.setenv("SYNTHREP_GENERATOR_ROOT", str(tmp_path))
    paths = DatasetPaths(tmp_path, "pets")
    paths.make_folders()
    header = BatchHeader(
        id="b",
        dataset="pets",
        owner="",
        priority=5,
        num_prompts=2,
        settings=GenerationSettings(),
        body_sha256="",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    write_batch(paths, header, ["a dog", "a cat"])
    failure = Failure(
        gid=header.gid(1, "a cat"), batch="b", index=1, prompt="a cat", reason="no", attempts=1
    )
    record_failures(paths, CommitLog(paths.log), [failure])
    return paths


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["dataset", *arguments])


def test_a_whole_data_set_is_status_0_with_its_counts(pets: DatasetPaths) -> None:
    result = run("verify", "pets")
    assert result.exit_code == 0
    assert (
        "2 prompts accepted = 0 committed + 1 failed + 0 cancelled + 1 undecided" in result.output
    )
    counts = json.loads(run("verify", "pets", "--json").output)
    assert (counts["accepted"], counts["failed"], counts["undecided"]) == (2, 1, 1)


def test_leftovers_are_status_1_until_they_are_repaired(pets: DatasetPaths) -> None:
    (pets.shards / f"00000001-{'a' * 12}.part").touch()
    orphan = pets.shards / "orphan.tar"
    orphan.touch()
    result = run("verify", "pets")
    assert result.exit_code == 1
    assert "leftover shards/orphan.tar" in result.output
    assert "synthrep dataset repair pets" in result.output
    assert json.loads(run("repair", "pets", "--json").output)["removed"] == ["shards/orphan.tar"]
    assert run("verify", "pets").exit_code == 0
    assert run("verify", "pets", "--min-age", "0").exit_code == 1
    assert "removed" in run("repair", "pets", "--min-age", "0").output
    assert run("repair", "pets").output == "nothing to repair\n"


def test_damage_is_status_1_and_named(pets: DatasetPaths) -> None:
    next(pets.failures.iterdir()).write_text("[]")
    result = run("verify", "pets")
    assert result.exit_code == 1
    assert "corrupt  failures/00000001-" in result.output


@pytest.mark.parametrize("command", ["verify", "repair"])
@pytest.mark.parametrize("name", ["fish", "../pets"])
def test_what_is_no_data_set_is_one_sentence(pets: DatasetPaths, command: str, name: str) -> None:
    result = run(command, name)
    assert result.exit_code == 1
    assert result.output.startswith("synthrep: ")
    assert result.output.count("\n") == 1


def test_the_root_can_be_given(pets: DatasetPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHREP_GENERATOR_ROOT", "/nowhere")
    assert run("verify", "pets").exit_code == 1
    assert run("verify", "pets", "--root", str(pets.root)).exit_code == 0
