"""Published encoders become completed runs; nothing in their files is executed."""

from __future__ import annotations

import argparse
import hashlib
import zipfile

import pytest
import timm
import torch
from torch import nn

from synthrep_shared.presets import load_preset, preset_names
from synthrep_trainer import published
from synthrep_trainer.checkpoint import load_newest
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.errors import PublishedFileError
from synthrep_trainer.published import import_published, read_published
from synthrep_trainer.runs import Workplace

HIDDEN = 32


def published_model(**arguments):
    """The layout of the authors' StableRep with the smallest of their ViTs, and a narrow head."""
    visual = timm.create_model("vit_small_patch16_224", num_classes=0, **arguments)
    width = visual.embed_dim
    head = nn.Sequential()
    for number, (wide, out) in enumerate([(width, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 8)], 1):
        head.add_module(f"layer{number}", nn.Linear(wide, out))
        if number < 3:
            head.add_module(f"bn{number}", nn.SyncBatchNorm(out))
            head.add_module(f"relu{number}", nn.ReLU())
    return nn.ModuleDict({"visual": visual, "image_mlp": head})


def published_features(visual, images):
    """What timm 0.5.4, which the authors used, calls the features."""
    patches = visual.patch_embed(images)
    tokens = torch.cat([visual.cls_token.expand(len(images), -1, -1), patches], dim=1)
    return visual.norm(visual.blocks(tokens + visual.pos_embed))[:, 0]


def checkpoint_of(model, weights):
    """What the authors' training writes beside the weights."""
    optimizer = torch.optim.AdamW(model["image_mlp"].parameters())
    args = argparse.Namespace(model="small", folder_list=["a", "b"], blr=2e-4, down_res=None)
    return {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 14,
            "scaler": {"scale": 65536.0, "growth_factor": 2.0}, "args": args}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return published_model().eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "cc12m.pth"
    torch.save(checkpoint_of(model, model.state_dict()), path)
    return path


@torch.no_grad()
def test_a_published_file_gives_its_features(model, file):
    found = read_published(file)
    assert found.config == EncoderConfig("vit_small_patch16_224", 224)
    encoder = make_encoder(found.config, seed=1)
    encoder.load_state_dict(found.tensors)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = published_features(model["visual"], images)
    torch.testing.assert_close(encoder.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_a_published_file_becomes_a_completed_run(model, file, tmp_path):
    place = Workplace(tmp_path)
    recipe = load_preset("cc12m_vitb16_35ep").request | {"model": "vit_small_patch16_224"}
    run = import_published(file, place, dataset="cc12m", recipe=recipe)
    assert [(r.id, r.state) for r in place.runs()] == [(run.id, "completed")]
    assert run.record.request.captions_per_batch == recipe["captions_per_batch"]
    kept = load_newest(run.checkpoints)
    assert kept.step == recipe["max_steps"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert kept.state["origin"] == {"file": "cc12m.pth", "sha256": sha256, "epoch": 14}
    assert set(kept.parts) == {"encoder"}
    assert place.checkpoint(str(kept.path.relative_to(tmp_path))) == kept.path


def test_a_recipe_for_another_model_is_refused_and_leaves_nothing(file, tmp_path):
    recipe = load_preset("cc12m_vitb16_35ep").request
    with pytest.raises(PublishedFileError, match="recipe is for a vit_base_patch16_224 at 224"):
        import_published(file, Workplace(tmp_path), dataset="cc12m", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_an_import_that_fails_midway_leaves_nothing(file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("synthrep_trainer.published.save_checkpoint", fail)
    with pytest.raises(OSError, match="no space"):
        import_published(file, Workplace(tmp_path), dataset="cc12m")
    assert not list((tmp_path / "runs").glob("*"))


def small(model):
    """Tensors of the ViT's shapes that take four bytes each in a file."""
    shapes = {name: tensor.shape for name, tensor in model["visual"].state_dict().items()}
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("key", "prefix"), [("state_dict", "module.visual."), ("model", ""), ("state_dict", "visual.")]
)
def test_the_authors_other_names_are_known(model, tmp_path, key, prefix):
    tensors = small(model) | {"head.weight": torch.zeros(3, 384), "norm.bias": torch.ones(384)}
    content = {key: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}}
    torch.save(content, tmp_path / "other.pth")
    found = read_published(tmp_path / "other.pth")
    assert torch.equal(found.tensors["backbone.norm.bias"], torch.ones(384))


class Trap:
    """Unpickling it by the usual way makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(model, tmp_path):
    trap = tmp_path / "sprung"
    content = checkpoint_of(model, {"visual.cls_token": torch.zeros(1, 1, 384)})
    torch.save(content | {"args": Trap(trap)}, tmp_path / "bad.pth")
    with pytest.raises(PublishedFileError, match=r"bad\.pth cannot be read safely"):
        read_published(tmp_path / "bad.pth")
    assert not trap.exists()


def broken(model, **changes):
    tensors = {**small(model), **changes}
    return {"model": {f"visual.{name}": t for name, t in tensors.items() if t is not None}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: [1, 2], "holds a list"),
        (lambda model: {"model": 3}, "neither 'model' nor 'state_dict'"),
        (lambda model: {"model": {"fc.weight": torch.zeros(2)}}, "no 'visual.cls_token'"),
        (lambda model: broken(model, pos_embed=None), "no ViT with patches and positions"),
        (lambda model: broken(model, pos_embed=3), "no ViT with patches and positions"),
        (lambda model: broken(model, **{"norm.bias": None}), r"Missing key.*norm\.bias"),
        (lambda model: broken(model, **{"norm.bias": torch.zeros(3)}), "size mismatch"),
        (lambda model: broken(model, **{"norm.bias": torch.full((384,), torch.nan)}), "no numbers"),
        (
            lambda model: broken(model, **{"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}),
            "no published ViT has width 64, depth 12 and patches of 8 px",
        ),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_published_encoder_says_why(model, tmp_path, make, words):
    torch.save(make(model), tmp_path / "odd.pth")
    with pytest.raises(PublishedFileError, match=r"(?s)odd\.pth.*" + words):
        read_published(tmp_path / "odd.pth")


@pytest.mark.parametrize("pickled", [b"\x80\x02h\x05.", b"\x80\x02)R.", b"\x80\x02K\x01Q."])
def test_a_damaged_pickle_is_refused(tmp_path, pickled):
    torch.save({}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "odd.pth", "w") as odd,
    ):
        for name in whole.namelist():
            odd.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(PublishedFileError, match="cannot be read safely"):
        read_published(tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(PublishedFileError, match="safely: no file that torch.save wrote"):
        read_published(tmp_path / "odd.pth")


def test_every_model_of_a_published_recipe_is_known():
    models = {load_preset(name).request["model"] for name in preset_names()}
    assert models <= set(published._MODELS.values())
