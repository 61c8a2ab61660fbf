"""An export is compared before it is published, and appears whole or not at all."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from synthrep_shared.messages import RunRequest
from synthrep_trainer import export as export_module
from synthrep_trainer.checkpoint import load_checkpoint, save_checkpoint
from synthrep_trainer.checkpoint_folders import open_checkpoint
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.errors import ExportError, NoCheckpointError
from synthrep_trainer.export import DESCRIPTION, export_checkpoint, find_checkpoint
from synthrep_trainer.runs import Workplace

CONFIG = EncoderConfig("vit_synthrep_tiny", image_size_px=16)


def save(folder, step=7, seed=0):
    encoder = make_encoder(CONFIG, seed=seed)
    state = {"encoder": json.loads(CONFIG.to_json()), "request": {"seed": seed}}
    return save_checkpoint(folder, step, {"encoder": encoder.state_dict()}, state)


@pytest.fixture
def run(tmp_path):
    return Workplace(tmp_path / "trainer").submit_run(RunRequest(dataset="birds", max_steps=9))


@pytest.fixture
def path(run):
    return save(run.checkpoints)


@pytest.fixture
def checkpoint(path):
    return load_checkpoint(open_checkpoint(path))


def test_an_export_holds_model_and_origin(checkpoint, tmp_path):
    made = export_checkpoint(checkpoint, tmp_path / "out", "timm")
    assert made.folder == tmp_path / "out"
    assert made.greatest_difference < 1e-5
    names = sorted(p.name for p in made.folder.iterdir())
    assert names == ["config.json", "model.safetensors", DESCRIPTION]
    assert len({p.stat().st_mode for p in made.folder.iterdir()}) == 1
    described = json.loads((made.folder / DESCRIPTION).read_text())
    assert (described["format"], described["step"], described["features"]) == ("timm", 7, 128)
    assert described["preprocessing"]["centre_crop_px"] == 16
    assert EncoderConfig(**described["encoder"]) == CONFIG


def test_an_export_is_not_overwritten_unasked(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(checkpoint, tmp_path / "out", "timm")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_export_is_replaced_whole(checkpoint, tmp_path):
    output = tmp_path / "out"
    export_checkpoint(checkpoint, output, "timm")
    (output / "stale").touch()
    other = load_checkpoint(open_checkpoint(save(tmp_path / "others", step=8)))
    export_checkpoint(other, output, "timm", replace=True)
    assert not (output / "stale").exists()
    assert json.loads((output / DESCRIPTION).read_text())["step"] == 8
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_folder_that_is_no_export_is_never_replaced(checkpoint, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").touch()
    with pytest.raises(ExportError, match="no earlier export"):
        export_checkpoint(checkpoint, output, "timm", replace=True)
    assert (output / "thesis.tex").exists()


class WrongFormat:
    """Reads other features than were written."""

    def write(self, encoder, config, folder):
        (folder / "model").touch()

    def features(self, folder, images):
        return torch.full((len(images), 128), 3.0)


def test_an_export_whose_features_differ_is_not_published(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "FORMATS", {"timm": WrongFormat()})
    with pytest.raises(ExportError, match="features differ"):
        export_checkpoint(checkpoint, tmp_path / "out" / "model", "timm")
    assert list((tmp_path / "out").iterdir()) == []


class FormatWithoutLibrary(WrongFormat):
    def write(self, encoder, config, folder):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")


def test_a_missing_library_is_named_with_the_remedy(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "FORMATS", {"onnx": FormatWithoutLibrary()})
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install .*\[export\]"):
        export_checkpoint(checkpoint, tmp_path / "out", "onnx")


def test_a_checkpoint_is_found_by_path_by_name_and_by_run(path, run, tmp_path):
    save(path.parent, step=9)
    place = Workplace(tmp_path / "trainer")
    assert find_checkpoint(str(path), place).step == 7
    assert find_checkpoint(f"runs/{run.id}/checkpoints/{path.name}", place).step == 7
    assert find_checkpoint(run.id, place).step == 9


@pytest.mark.parametrize("what", ["nothing", "20260101-000000-000000-ffffffffffff", ""])
def test_what_is_no_checkpoint_is_said(what, path, tmp_path):
    with pytest.raises(NoCheckpointError, match="neither a checkpoint nor a run"):
        find_checkpoint(what, Workplace(tmp_path / "trainer"))


def test_a_checkpoint_without_an_encoder_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"encoder": {"w": torch.ones(2)}}, {"encoder": {}})
    checkpoint = load_checkpoint(open_checkpoint(path))
    with pytest.raises(NoCheckpointError, match="holds no encoder"):
        export_checkpoint(checkpoint, tmp_path / "out", "timm")


def test_averaged_weights_are_exported_where_the_run_has_them(tmp_path):
    parts = {
        "encoder": make_encoder(CONFIG, seed=0).state_dict(),
        "ema_encoder": make_encoder(CONFIG, seed=1).state_dict(),
    }
    state = {"encoder": json.loads(CONFIG.to_json()), "request": {"seed": 0}}
    checkpoint = load_checkpoint(open_checkpoint(save_checkpoint(tmp_path, 1, parts, state)))
    for weights, part in (("auto", "ema_encoder"), ("ema", "ema_encoder"), ("last", "encoder")):
        folder = export_checkpoint(checkpoint, tmp_path / weights, "timm", weights=weights).folder
        found = safetensors.torch.load_file(folder / "model.safetensors")
        assert torch.equal(found["cls_token"], parts[part]["backbone.cls_token"])


def test_averaged_weights_that_are_not_there_are_refused(checkpoint, tmp_path):
    with pytest.raises(NoCheckpointError, match="no averaged encoder"):
        export_checkpoint(checkpoint, tmp_path / "out", "timm", weights="ema")
