"""`synthrep export` makes a folder, says where, and says no in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.messages import RunRequest
from synthrep_trainer.checkpoint import save_checkpoint
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.runs import Workplace


@pytest.fixture
def trained(tmp_path, monkeypatch):
    config = EncoderConfig("vit_synthrep_tiny", image_size_px=16)
    state = {"encoder": json.loads(config.to_json()), "request": {"seed": 0}}
    parts = {"encoder": make_encoder(config, seed=0).state_dict()}
    place = Workplace(tmp_path / "trainer")
    run = place.submit_run(RunRequest(dataset="birds", max_steps=9))
    save_checkpoint(run.checkpoints, 7, parts, state)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNTHREP_TRAINER_RUNS", str(tmp_path / "trainer"))
    return run


def call(*arguments):
    return CliRunner().invoke(app, ["export", *arguments])


def test_a_run_is_exported_under_its_name(trained):
    result = call(trained.id, "--format", "timm", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["folder"] == f"runs/exports/{trained.id}-7-timm"
    assert answer["greatest_difference"] < 1e-4
    assert (Path(answer["folder"]) / "model.safetensors").is_file()


def test_a_checkpoint_is_exported_to_the_folder_asked_for(trained):
    path = trained.checkpoints / "step-000000007"
    result = call(str(path), "--format", "hf", "--output", "made")
    assert result.exit_code == 0, result.output
    assert 'load it: transformers.AutoModel.from_pretrained("made")\n' in result.stdout
    assert result.stdout.startswith("made  features within")
    assert (Path("made") / "preprocessor_config.json").is_file()


def test_the_line_that_loads_an_export_does(trained):
    line = call(trained.id, "--format", "timm", "--output", "made").stdout.splitlines()[-1]
    code = line.removeprefix("load it: timm.create_model(").removesuffix(", pretrained=True)")
    assert timm.create_model(code.strip('"'), pretrained=True).num_features == 128


def test_only_force_replaces_an_export(trained):
    assert call(trained.id, "--format", "timm", "--output", "made").exit_code == 0
    again = call(trained.id, "--format", "timm", "--output", "made")
    assert again.exit_code == 1
    assert "made exists already" in again.output
    assert call(trained.id, "--format", "timm", "--output", "made", "--force").exit_code == 0


def test_an_unknown_run_and_an_unknown_format_are_refused(trained):
    unknown = call("nothing", "--format", "timm")
    assert unknown.exit_code == 1
    assert "neither a checkpoint nor a run" in unknown.output
    assert call(trained.id, "--format", "pickle").exit_code == 2
