"""The diffusers synthesizer on a tiny random pipeline, against plain calls of that pipeline."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from synthrep_generator.diffusion import load_synthesizer, pixels_from_decoded  # noqa: E402
from synthrep_generator.errors import (  # noqa: E402
    ModelFilesMissingError,
    PermanentPromptError,
)
from synthrep_generator.settings import ModelConfig  # noqa: E402
from synthrep_generator.synthesis import ImageTask, Recipe  # noqa: E402

TOKENS, WIDTH, LATENTS = 12, 32, 6
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
}


def make_tokenizer(folder: Path) -> Any:
    """A byte-level CLIP tokenizer that knows letters and no merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline of the shape of `tiny`: 8x8 latents of six channels, images of 32 px."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipeline")
    tokenizer = make_tokenizer(root / "tokenizer-source")
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=LATENTS,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "model")
    return root / "model"


def config(folder: Path, **changes: Any) -> ModelConfig:
    values = {"path": folder, "generate_px": 32, "store_px": 32, "device_batch_images": 4}
    return ModelConfig.model_validate(values | {"dtype": "fp32"} | changes)


@pytest.fixture(scope="session")
def synthesizer(folder: Path) -> Any:
    return load_synthesizer(config(folder), device="cpu")


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "scheduler": "ddim",
        "negative_prompt": "",
    }
    return Recipe(**values | changes)


def make(synthesizer: Any, tasks: Sequence[ImageTask], wanted: Recipe) -> list[Any]:
    results: list[Any] = synthesizer.generate(tasks, wanted, lambda: None)
    return results


def by_the_pipeline(folder: Path, task: ImageTask, wanted: Recipe) -> Any:
    """One image by a plain call: prompts as text, one at a time."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = SCHEDULERS[wanted.scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        task.prompt,
        negative_prompt=wanted.negative_prompt,
        generator=torch.Generator().manual_seed(task.seed),
        guidance_scale=wanted.guidance_scale,
        num_inference_steps=wanted.num_inference_steps,
        height=32,
        width=32,
        output_type="np",
    ).images[0]
    return (image * 255).round()


@pytest.mark.parametrize(
    "wanted",
    [
        recipe(),
        recipe(scheduler="dpm++", negative_prompt="a bee"),
        recipe(scheduler="euler", guidance_scale=1.5),
        recipe(guidance_scale=1.0),
    ],
)
def test_a_batch_is_what_the_pipeline_makes_one_by_one(
    folder: Path, synthesizer: Any, wanted: Recipe
) -> None:
    tasks = [ImageTask("a bird", 1), ImageTask("a bird", 2), ImageTask("two red bees", 3)]
    for task, image in zip(tasks, make(synthesizer, tasks, wanted), strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (32, 32, 3)
        assert np.abs(image - by_the_pipeline(folder, task, wanted)).max() <= 1


def test_pixels_depend_on_seed_and_prompt(synthesizer: Any) -> None:
    tasks = [ImageTask("a bird", 1), ImageTask("a bird", 2), ImageTask("two red bees", 1)]
    first, other_seed, other_prompt = (i.astype(int) for i in make(synthesizer, tasks, recipe()))
    assert np.abs(first - other_seed).max() > 10
    assert np.abs(first - other_prompt).max() > 1


def test_more_images_than_the_device_takes_are_made_in_order(synthesizer: Any) -> None:
    tasks = [ImageTask(f"bird {i // 2}", i) for i in range(7)]
    together = make(synthesizer, tasks, recipe())
    alone = [make(synthesizer, [task], recipe())[0] for task in tasks]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(together, alone, strict=True))


def test_time_of_denoising_and_decoding_is_told(synthesizer: Any) -> None:
    before, started = synthesizer.use, time.perf_counter()
    synthesizer.generate([ImageTask("a", 1), ImageTask("b", 2)], recipe(), lambda: None)
    spent_s = time.perf_counter() - started
    use = synthesizer.use.since(before)
    assert min(use.denoise_s, use.decode_s) > 0
    assert 0.5 * spent_s < use.denoise_s + use.decode_s < spent_s


def test_each_caption_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesizer = load_synthesizer(config(folder), device="cpu")
    encoded: list[str] = []
    original = synthesizer._pipeline.encode_prompt

    def count(prompt: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        encoded.extend(prompt or [])
        return original(prompt, *args, **kwargs)

    monkeypatch.setattr(synthesizer._pipeline, "encode_prompt", count)
    for seeds in (range(6), range(6, 9)):
        make(synthesizer, [ImageTask(f"bird {s % 2}", s) for s in seeds], recipe())
    assert sorted(encoded) == ["", "bird 0", "bird 1"]


def test_stored_images_are_resized_with_antialiasing(folder: Path) -> None:
    tasks = [ImageTask("a bird", 1)]
    (large,) = make(load_synthesizer(config(folder), device="cpu"), tasks, recipe())
    (small,) = make(load_synthesizer(config(folder, store_px=16), device="cpu"), tasks, recipe())
    assert small.shape == (16, 16, 3)
    averages = large.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.abs(small - averages).mean() < 6


def test_bytes_cover_the_range_and_are_rounded() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 6, 6)
    row = pixels_from_decoded(values, 6)[0, 0, :, 0].tolist()
    assert row == [0, 0, 128, 255, 255, 255]


def test_an_image_that_is_no_numbers_fails_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesizer = load_synthesizer(config(folder), device="cpu")
    original = synthesizer._denoise

    def spoil(*args: Any) -> Any:
        latents = original(*args)
        latents[1] = float("nan")
        return latents

    monkeypatch.setattr(synthesizer, "_denoise", spoil)
    first, second, third = make(
        synthesizer, [ImageTask("a bird", seed) for seed in range(3)], recipe()
    )
    assert isinstance(second, PermanentPromptError)
    assert first.shape == third.shape == (32, 32, 3)


def test_out_of_memory_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesizer = load_synthesizer(config(folder, device_batch_images=8), device="cpu")
    sizes: list[int] = []
    original = synthesizer._denoise

    def limited(tasks: Sequence[ImageTask], *args: Any) -> Any:
        sizes.append(len(tasks))
        if len(tasks) > limit:
            raise torch.OutOfMemoryError
        return original(tasks, *args)

    monkeypatch.setattr(synthesizer, "_denoise", limited)
    tasks = [ImageTask("a bird", seed) for seed in range(8)]
    limit = 2
    assert len(make(synthesizer, tasks, recipe(num_inference_steps=1))) == 8
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert synthesizer.use.out_of_memory == 2
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        make(synthesizer, tasks[:1], recipe(num_inference_steps=1))


def test_each_image_tells_the_pass_that_made_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesizer = load_synthesizer(config(folder, device_batch_images=8), device="cpu")
    original, calls = synthesizer._denoise, iter(range(99))

    def limited(tasks: Sequence[ImageTask], *args: Any) -> Any:
        if next(calls) in (0, 2):  # the second half of the pass needs more than the first
            raise torch.OutOfMemoryError
        latents = original(tasks, *args)
        latents[0] = float("nan")
        return latents

    monkeypatch.setattr(synthesizer, "_denoise", limited)
    prompts = ["a bird " * 40, *["a bird"] * 7]
    tasks = [ImageTask(prompt, seed) for seed, prompt in enumerate(prompts)]
    refuse = recipe(num_inference_steps=1, long_captions="refuse")
    pending = synthesizer.start(tasks, refuse, lambda: None)
    failed = [isinstance(result, PermanentPromptError) for result in pending.results()]
    assert failed == [True, True, False, False, True, True, True, True]
    assert pending.shared_by == [0, 3, 3, 3, 1, 1, 1, 1]


def test_a_run_that_was_stopped_leaves_nothing_behind(synthesizer: Any) -> None:
    task, wanted = ImageTask("a bird", 1), recipe(scheduler="dpm++")
    before = make(synthesizer, [task], wanted)[0]
    steps = iter([None, None])

    def stop() -> None:
        next(steps)

    with pytest.raises(StopIteration):
        synthesizer.generate([task], wanted, stop)
    assert np.array_equal(make(synthesizer, [task], wanted)[0], before)


def spoil_index(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | changes))
    return target


def test_a_pipeline_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    model = spoil_index(folder, tmp_path / "m", _class_name="AudioLDM2Pipeline")
    with pytest.raises(ModelFilesMissingError, match="AudioLDM2Pipeline; expected one of"):
        load_synthesizer(config(model), device="cpu")


def test_code_from_the_model_s_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    model = spoil_index(folder, tmp_path / "m", unet=["my_unet", "MyUNet"])
    (model / "unet" / "my_unet.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelFilesMissingError, match="my_unet"):
        load_synthesizer(config(model), device="cpu")


def test_weights_that_are_a_pickle_are_refused(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(folder, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ModelFilesMissingError):
        load_synthesizer(config(model), device="cpu")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesMissingError, match="absent"):
        load_synthesizer(config(tmp_path / "absent"), device="cpu")
