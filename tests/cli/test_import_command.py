"""`synthrep import` makes a run of a published file, and repeats the published numbers."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.presets import load_preset
from synthrep_trainer.runs import Workplace


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A ViT-S of zeros in the authors' layout."""
    shapes = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    weights = {f"visual.{name}": torch.zeros(1).expand(t.shape) for name, t in shapes.items()}
    torch.save({"model": weights, "epoch": 14}, tmp_path / "small.pth")
    monkeypatch.setenv("SYNTHREP_TRAINER_RUNS", str(tmp_path / "trainer"))
    return tmp_path / "small.pth"


def call(*arguments):
    return CliRunner().invoke(app, ["import", *map(str, arguments)])


def test_a_published_file_becomes_a_run(file, tmp_path):
    result = call(file, "--dataset", "cc12m", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (run,) = Workplace(tmp_path / "trainer").runs()
    assert answer == {"run": run.id, "model": "vit_small_patch16_224", "expected": []}
    assert (run.state, run.record.request.dataset) == ("completed", "cc12m")


def test_a_preset_states_the_published_numbers(file, monkeypatch):
    preset = load_preset("cc12m_vitb16_35ep")
    request = preset.request | {"model": "vit_small_patch16_224"}
    preset = preset.model_copy(update={"request": request})
    monkeypatch.setattr("synthrep_cli.import_command.load_preset", lambda name: preset)
    result = call(file, "--preset", "cc12m_vitb16_35ep")
    assert result.exit_code == 0, result.output
    assert "published: imagenet, imagenet-linear: 72.8%" in result.stdout


def test_no_to_a_file_or_a_preset_is_one_sentence(file, tmp_path):
    other = call(file, "--preset", "cc12m_vitb16_35ep")
    assert other.exit_code == 1
    assert "the recipe is for a vit_base_patch16_224" in other.output
    assert "no preset 'none'" in call(file, "--preset", "none").output
    absent = call(tmp_path / "absent.pth")
    assert absent.exit_code == 1
    assert "absent.pth" in absent.output
    assert not (tmp_path / "trainer").exists()
