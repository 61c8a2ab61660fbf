"""Others read what was written, with none of our code, and see the same features."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from synthrep_trainer.augment import normalise
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.errors import ExportError
from synthrep_trainer.export_formats import FORMATS, preprocessing

MODELS = {
    "own": EncoderConfig("vit_synthrep_tiny", image_size_px=32),
    "timm's": EncoderConfig("vit_tiny_patch16_224", image_size_px=48, drop_path_rate=0.1),
    "other patches": EncoderConfig("vit_tiny_patch16_224", image_size_px=32, patch_size_px=8),
}


@pytest.fixture(autouse=True)
def _without_gradient():
    with torch.no_grad():
        yield


def make_trained(config):
    """An encoder in which no two weights, biases or norms are equal."""
    encoder = make_encoder(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return encoder


def draw_images(config, num_images=5):
    side = config.image_size_px
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_images, 3, side, side, generator=generator)


def assert_equal_features(found, encoder, images):
    expected = encoder(images)
    assert expected.std() > 0.1
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_timm_reads_its_folder(tmp_path, model):
    config = MODELS[model]
    encoder, images = make_trained(config), draw_images(config)
    FORMATS["timm"].write(encoder, config, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_equal_features(loaded(images), encoder, images)


def test_timm_arguments_and_state_dict_build_the_model_too(tmp_path):
    config = MODELS["own"]
    encoder, images = make_trained(config), draw_images(config)
    FORMATS["timm"].write(encoder, config, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    loaded = timm.create_model(
        described["architecture"], num_classes=0, **described["model_args"]
    ).eval()
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert_equal_features(loaded(images), encoder, images)


@pytest.mark.parametrize("model", MODELS)
def test_transformers_reads_the_hugging_face_folder(tmp_path, model):
    config = MODELS[model]
    encoder, images = make_trained(config), draw_images(config)
    FORMATS["hf"].write(encoder, config, tmp_path)
    loaded, report = AutoModel.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    output = loaded.eval()(pixel_values=images)
    assert_equal_features(output.pooler_output, encoder, images)
    assert_equal_features(output.last_hidden_state[:, 0], encoder, images)


def test_onnxruntime_reads_the_graph_with_any_number_of_images(tmp_path):
    config = MODELS["own"]
    encoder = make_trained(config)
    FORMATS["onnx"].write(encoder, config, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for num_images in (1, 5):
        images = draw_images(config, num_images)
        (found,) = session.run(["features"], {"images": images.numpy()})
        assert_equal_features(torch.from_numpy(found), encoder, images)
        assert_equal_features(FORMATS["onnx"].features(tmp_path, images), encoder, images)


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_a_format_reads_back_what_it_wrote(tmp_path, name):
    config = MODELS["own"]
    encoder, images = make_trained(config), draw_images(config)
    FORMATS[name].write(encoder, config, tmp_path)
    assert_equal_features(FORMATS[name].features(tmp_path, images), encoder, images)


def test_a_vit_that_transformers_has_not_is_refused_and_goes_as_timm(tmp_path):
    config = EncoderConfig("deit3_small_patch16_224", image_size_px=32)
    encoder, images = make_trained(config), draw_images(config)
    with pytest.raises(ExportError, match="no blocks.0.ls1.gamma; export as timm"):
        FORMATS["hf"].write(encoder, config, tmp_path)
    FORMATS["timm"].write(encoder, config, tmp_path)
    assert_equal_features(FORMATS["timm"].features(tmp_path, images), encoder, images)


@pytest.fixture
def photo():
    """80 x 64 pixels of smooth colour."""
    rows, columns = np.mgrid[0:64, 0:80]
    channels = [np.sin(rows / 9 + shift) + np.cos(columns / 7 - shift) for shift in range(3)]
    return Image.fromarray(((np.stack(channels, axis=-1) + 2) * 63).astype(np.uint8))


@pytest.fixture
def prepared(photo):
    """The photo as probes prepare it: the short side resized, the centre cropped."""
    pixels = np.asarray(photo.resize((40, 32), Image.Resampling.BICUBIC))[:, 4:36]
    return normalise(torch.from_numpy(pixels.copy())[None])[0]


def test_timm_prepares_images_as_probes_do(tmp_path, photo, prepared):
    config = MODELS["own"]
    FORMATS["timm"].write(make_trained(config), config, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(transform(photo), prepared, atol=1e-5, rtol=1e-5)


def test_transformers_prepares_images_as_probes_do(tmp_path, photo, prepared):
    config = MODELS["own"]
    FORMATS["hf"].write(make_trained(config), config, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    found = processor(photo, return_tensors="pt").pixel_values[0]
    assert (found - prepared).abs().max() < 2.1 / 255 / 0.224  # two grey levels


def test_preprocessing_is_told(photo, prepared):
    told = preprocessing(MODELS["own"])
    side = told["resize_short_side_px"]
    assert told["centre_crop_px"] == side == 32
    pixels = np.asarray(photo.resize((side * 80 // 64, side), Image.Resampling.BICUBIC))
    floats = (pixels[:, 4:36] * told["scale"] - told["mean"]) / told["std"]
    np.testing.assert_allclose(floats.transpose(2, 0, 1), prepared, atol=1e-5)
