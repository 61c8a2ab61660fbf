"""The stages of making `tiny`, in small: autoencoder, diffusion, pipeline, captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from models.training import train_tiny
from models.training.autoencoder import (
    LATENT_CHANNELS,
    encode_all,
    make_autoencoder,
    normalise_latents,
    train_autoencoder,
)
from models.training.budget import Budget
from models.training.captioner import COLOURS
from models.training.classifier import SmallResNet, tensor_from_images
from models.training.diffusion import TextToLatents, make_pipeline, train_diffusion
from models.training.judge import draw, load
from models.training.photos import CLASSES

CAPTIONS = [["a red bird", "a bird"], ["a frog"]] * 32


@pytest.fixture(scope="module")
def perceptual() -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(num_classes=10, width=4)


@pytest.fixture
def untrained() -> AutoencoderKL:
    torch.manual_seed(3)
    return make_autoencoder().eval()


def test_normalised_latents_have_zero_mean_and_unit_variance(untrained, pixels):
    normalise_latents(untrained, encode_all(untrained, pixels))
    mean, deviation = encode_all(untrained, pixels)[0]
    variance = mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))
    torch.testing.assert_close(
        mean.mean((0, 2, 3)), torch.zeros(LATENT_CHANNELS), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(variance, torch.ones(LATENT_CHANNELS), atol=1e-3, rtol=0)


@torch.inference_mode()
def test_the_normalisation_that_is_folded_into_the_weights_is_exact(untrained, pixels):
    images = tensor_from_images(pixels[:8])
    before = encode_all(untrained, pixels)
    decoded = untrained.decode(before[0, 0, :8]).sample
    mapped = normalise_latents(untrained, before)
    # The folded encoder gives the mapped latents of both flips by itself.
    torch.testing.assert_close(encode_all(untrained, pixels), mapped, atol=1e-5, rtol=1e-5)
    posterior = untrained.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, mapped[0, 0, :8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.std, mapped[0, 1, :8], atol=1e-5, rtol=1e-5)
    # The folded decoder turns them into the images that there were before.
    torch.testing.assert_close(
        untrained.decode(mapped[0, 0, :8]).sample, decoded, atol=1e-5, rtol=1e-5
    )


def test_latents_of_both_flips_are_those_of_the_mirrored_photos(untrained, pixels):
    latents = encode_all(untrained, pixels, batch_size=40)
    mirrored = encode_all(untrained, np.ascontiguousarray(pixels[:, :, ::-1]))
    assert latents.shape == (2, 2, len(pixels), LATENT_CHANNELS, 8, 8)
    torch.testing.assert_close(latents.flip(0), mirrored, atol=1e-5, rtol=1e-5)


def equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_the_autoencoder_trains_saves_and_goes_on(perceptual, pixels, tmp_path):
    def train(max_steps: int) -> AutoencoderKL:
        return train_autoencoder(
            pixels, perceptual, tmp_path, minutes=1, max_steps=max_steps, batch_size=8, seed=1
        )

    first = train(3)
    assert equal_weights(train(3), first)
    second = train(5)
    assert not equal_weights(second, first)
    assert json.loads((tmp_path / "autoencoder.json").read_text())["steps"] == 5
    saved = load_file(tmp_path / "autoencoder.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in second.state_dict().items())


def test_a_budget_counts_all_attempts(tmp_path):
    budget = Budget(tmp_path / "stage.json", minutes=1, max_steps=8)
    budget.steps += 6
    budget.save()
    seconds = json.loads((tmp_path / "stage.json").read_text())["seconds"]
    again = Budget(tmp_path / "stage.json", minutes=1, max_steps=8)
    assert (again.steps, again.spent) == (6, 0.75)
    assert again.seconds >= seconds
    (tmp_path / "stage.json").write_text(json.dumps({"steps": 6, "seconds": 45.0}))
    by_time = Budget(tmp_path / "stage.json", minutes=1, max_steps=None)
    assert by_time.spent == pytest.approx(0.75, abs=0.01)


def test_the_learning_rate_rises_then_falls_to_its_floor(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    budget = Budget(tmp_path / "stage.json", minutes=1, max_steps=100)
    for budget.steps in range(101):
        budget.set_lr(optimizer, 2.0, warmup_steps=10, floor=0.1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:9] == sorted(rates[:9])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def latents(pixels: np.ndarray) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, len(pixels), LATENT_CHANNELS, 8, 8)
    mean = torch.randn(shape, generator=generator)
    return torch.cat([mean, torch.full(shape, 0.1)], dim=1)


def train_some_diffusion(
    latents: Tensor, tokenizer: CLIPTokenizer, out: Path, max_steps: int
) -> TextToLatents:
    return train_diffusion(
        latents, CAPTIONS, tokenizer, out, minutes=1, max_steps=max_steps, batch_size=8, seed=1
    )


def test_diffusion_trains_saves_and_goes_on(latents, tokenizer, tmp_path):
    first = train_some_diffusion(latents, tokenizer, tmp_path, 3)
    moments = load_file(tmp_path / "diffusion_moments.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == set(dict(first.named_parameters()))
    assert equal_weights(train_some_diffusion(latents, tokenizer, tmp_path, 3), first)
    second = train_some_diffusion(latents, tokenizer, tmp_path, 5)
    assert not equal_weights(second, first)
    assert json.loads((tmp_path / "diffusion.json").read_text())["steps"] == 5
    average = load_file(tmp_path / "diffusion_ema.safetensors")
    assert all(torch.equal(average[name], tensor) for name, tensor in second.state_dict().items())


def test_training_goes_on_from_a_shipped_model(latents, tokenizer, untrained, tmp_path):
    model = train_some_diffusion(latents, tokenizer, tmp_path / "first", 2)
    make_pipeline(untrained, model, tokenizer).save_pretrained(tmp_path / "pipeline")
    train_tiny._halve(tmp_path / "pipeline")
    train_tiny._seed(tmp_path / "pipeline", tmp_path / "second")
    autoencoder = load_file(tmp_path / "second" / "autoencoder_normalised.safetensors")
    for name, tensor in untrained.state_dict().items():
        torch.testing.assert_close(autoencoder[name], tensor, atol=1e-3, rtol=1e-3)
    out = tmp_path / "second" / "diffusion"
    again = train_some_diffusion(latents, tokenizer, out, 1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    longer = train_some_diffusion(latents, tokenizer, out, 2)
    assert not equal_weights(longer, again)
    # What was trained since is not overwritten by what it began with.
    train_tiny._seed(tmp_path / "pipeline", tmp_path / "second")
    assert equal_weights(train_some_diffusion(latents, tokenizer, out, 2), longer)


def test_the_pipeline_survives_its_folder_in_half_precision(
    latents, tokenizer, untrained, tmp_path
):
    model = train_some_diffusion(latents, tokenizer, tmp_path / "run", 2)
    folder = tmp_path / "pipeline"
    make_pipeline(untrained, model, tokenizer).save_pretrained(folder)
    train_tiny._halve(folder)
    weights = [t for path in folder.glob("*/*.safetensors") for t in load_file(path).values()]
    assert {t.dtype for t in weights if t.is_floating_point()} == {torch.float16}
    assert not list(folder.rglob("*.bin"))

    pipeline = load(folder)
    for name, parameter in model.unet.named_parameters():
        torch.testing.assert_close(
            pipeline.unet.get_parameter(name).float(), parameter, atol=1e-3, rtol=1e-3
        )
    prompts = ["a red bird", "a frog"]
    first = draw(pipeline, prompts, 2.0, seed=5, steps=2)
    assert first.shape == (2, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(draw(pipeline, prompts, 2.0, seed=5, steps=2), first)
    assert not np.array_equal(draw(pipeline, prompts, 2.0, seed=9, steps=2), first)
    # Image i has seed 5 + i, whatever is drawn beside it, up to the rounding of a batch.
    alone = draw(pipeline, prompts[1:], 2.0, seed=6, steps=2)
    assert np.abs(alone[0].astype(int) - first[1]).max() <= 2


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """30 red birds before blue, 5 close-up green frogs before black."""
    red, blue, green, black = (COLOURS.index(c) for c in ("red", "blue", "green", "black"))
    labels = np.repeat([CLASSES.index("bird"), CLASSES.index("frog")], [30, 5])
    measured = np.repeat([[red, blue, 0], [green, black, 1]], [30, 5], axis=0)
    return labels, measured


def test_common_captions_are_those_of_at_least_twenty_photos(labelled):
    assert train_tiny.common_captions(*labelled) == [("a red bird, blue background", 30)]


def test_common_captions_come_by_frequency(labelled):
    labels, measured = (np.tile(array, (5, 1)[: array.ndim]) for array in labelled)
    assert train_tiny.common_captions(labels, measured) == [
        ("a red bird, blue background", 150),
        ("a close-up of a green frog, black background", 25),
    ]


def test_a_common_caption_is_whole_three_times_of_four(labelled):
    choices = train_tiny.caption_choices(*labelled)
    assert [texts[:3] for texts in choices[:30]] == [["a red bird, blue background"] * 3] * 30
    assert [texts[3] for texts in choices[:4]] == [
        "a bird", "a red bird", "a bird, blue background", "a red bird, blue background",
    ]  # fmt: skip


def test_a_rare_caption_loses_attributes(labelled):
    rare = train_tiny.caption_choices(*labelled)[30:]
    assert {len(set(texts)) for texts in rare} == {1}
    assert {texts[0] for texts in rare} == {
        "a frog", "a green frog", "a frog, black background", "a green frog, black background",
    }  # fmt: skip
