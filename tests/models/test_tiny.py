"""The model that the repository carries: small, complete, and plain diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from models.training.photos import CLASSES
from synthrep_generator.settings import GeneratorSettings

CONFIG = GeneratorSettings().models["tiny"]
MAX_BYTES = 16 * 2**20
PARTS = {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}

pytestmark = pytest.mark.skipif(
    not (CONFIG.path / "unet").exists(),
    reason="models/tiny has no weights; models/training makes them",
)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[StableDiffusionPipeline]:
    """As anyone would load it, without a line of this project."""
    loaded = StableDiffusionPipeline.from_pretrained(CONFIG.path, local_files_only=True)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: StableDiffusionPipeline, prompt: str, seeds: list[int]) -> np.ndarray:
    """Images (N, 32, 32, 3) in 0-1, one a seed, at the service's own defaults."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        [prompt] * len(seeds), generator=generators, output_type="np",
        guidance_scale=CONFIG.guidance_scale, num_inference_steps=CONFIG.num_inference_steps,
        height=CONFIG.generate_px, width=CONFIG.generate_px,
    ).images  # fmt: skip


def test_everything_together_fits_sixteen_mebibytes():
    files = [path for path in CONFIG.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_it_is_a_complete_pipeline_without_pickles():
    index = json.loads((CONFIG.path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {path.name for path in CONFIG.path.iterdir() if path.is_dir()} == PARTS
    weights = {path.parent.name for path in CONFIG.path.rglob("*.safetensors")}
    assert weights == {"text_encoder", "unet", "vae"}
    pickles = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    assert [path for path in CONFIG.path.rglob("*") if path.suffix in pickles] == []


def test_captions_are_many_distinct_and_of_every_class():
    lines = (CONFIG.path / "captions.tsv").read_text().splitlines()
    captions = [line.split("\t")[0] for line in lines]
    assert len(set(captions)) == len(captions) >= 300
    assert all(int(line.split("\t")[1]) > 0 for line in lines)
    words = [set(caption.replace(",", "").split()) for caption in captions]
    assert [name for name in CLASSES if not any(name in w for w in words)] == []


def test_a_card_says_what_it_is():
    card = (CONFIG.path / "README.md").read_text().lower()
    for word in ("licen", "cifar-10", "stablediffusionpipeline", "judgement.json"):
        assert word in card, word


def test_the_judgement_says_that_it_draws_what_it_is_told_and_copies_no_photo():
    figures = json.loads((CONFIG.path / "judgement.json").read_text())
    found = figures["by_guidance"][str(CONFIG.guidance_scale)]
    assert found["class_accuracy"] > 0.4  # 0.1 by chance
    assert found["background_accuracy"] > 0.3  # 0.125 by chance
    assert 0.3 < found["spread_ratio"] < 1.5
    assert found["nearest_photo_rms_min"] > 0.5 * found["held_out_nearest_rms_min"]


@pytest.mark.timeout(120)
def test_seeds_alone_decide_between_the_images_of_a_prompt(pipeline):
    prompt = "a red automobile, grey background"
    images = draw(pipeline, prompt, [1, 2, 1, 3])
    assert images.shape == (4, CONFIG.generate_px, CONFIG.generate_px, 3)
    assert np.isfinite(images).all()
    # Equal seeds in one batch differ by rounding at most; other seeds by far more than that.
    assert np.abs(images[0] - images[2]).max() < 2 / 255
    for first, second in ((0, 1), (0, 3), (1, 3)):
        assert np.sqrt(np.square(images[first] - images[second]).mean()) > 0.05
    assert np.array_equal(draw(pipeline, prompt, [1, 2, 1, 3]), images)


@pytest.mark.timeout(120)
def test_other_captions_make_other_images_of_one_seed(pipeline):
    first, second = (
        draw(pipeline, prompt, [4])[0]
        for prompt in ("a white ship, blue background", "a green frog, black background")
    )
    assert np.sqrt(np.square(first - second).mean()) > 0.1
    # The captions name the brightness of the border: light blue is not black.
    border = np.ones((32, 32), bool)
    border[4:-4, 4:-4] = False
    assert first[border].mean() > second[border].mean()
