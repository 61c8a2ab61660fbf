"""Images a second of the `tiny` model on one CPU thread, and what the service adds to them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.datasets import accept_prompts, plain_settings, runs_done, wait_for_groups
from benchmarks.harness import Dose, Measured, case, cpu_s, interleave
from benchmarks.services import Services
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_generator.synthesis import ImageTask, Recipe
from synthrep_shared.storage import DatasetPaths

_PROMPTS = 8
_IMAGES_PER_PROMPT = 10
_UNIT = "images/s of a core"
_OVERHEAD_PROMPTS = 208  # 2,080 images, thirteen jobs


@case("images, one prompt a call", unit=_UNIT, peer="diffusers loop, ten a call", min_ratio=1.45)
def against_one_prompt_a_call(dose: Dose) -> Measured:
    """Our device path against the loop that anyone writes first, each as it comes: that is fp32."""
    return interleave(_ours, lambda: _one_prompt_a_call("float32"), rounds=dose.rounds(5))


@case(
    "images, one prompt a call in our number format",
    unit=_UNIT,
    peer="diffusers loop, ten a call, dtype as ours",
)
def against_one_prompt_a_call_alike(dose: Dose) -> Measured:
    """The same loop by someone who knows which number format the core prefers."""
    return interleave(_ours, lambda: _one_prompt_a_call(_dtype()), rounds=dose.rounds(5))


@case(
    "images, batched by hand",
    unit=_UNIT,
    peer="diffusers, eighty a call, dtype as ours",
    min_ratio=0.95,
)
def against_batches_by_hand(dose: Dose) -> Measured:
    """Our device path against the best that the same pipeline does."""
    return interleave(_ours, lambda: _batched_by_hand(_dtype()), rounds=dose.rounds(5))


@case(
    "time not spent on the device",
    unit="part of a run",
    peer="the goal itself, 5 %",
    higher_is_better=False,
    max_value=0.05,
)
def overhead(dose: Dose) -> Measured:
    """1 - (denoise + decode) / (last commit - first start), by timers in a real worker."""
    prompts = dose.size(_OVERHEAD_PROMPTS, 32)
    runs = 1 if dose.is_quick else 3
    parts = [_overhead_of_a_run(prompts) for _ in range(runs)]
    shown = ", ".join(f"{part:.3f}" for part in parts)
    return Measured(median(parts), 0.05, runs, f"{prompts * _IMAGES_PER_PROMPT} images: {shown}")


def prompts_of_tiny(count: int) -> list[str]:
    """Captions of the kind that the model knows."""
    lines = (_tiny().path / "captions.tsv").read_text().splitlines()
    captions = [line.split("\t")[0] for line in lines]
    return [captions[i % len(captions)] for i in range(count)]


def _tiny() -> ModelConfig:
    return GeneratorSettings().models["tiny"]


def _rate(generate: Callable[[], object]) -> float:
    return _PROMPTS * _IMAGES_PER_PROMPT / cpu_s(generate)


def _ours() -> float:
    model, synthesizer = _tiny(), _synthesizer()
    recipe = Recipe(model.guidance_scale, model.num_inference_steps, model.scheduler, "")
    tasks = [
        ImageTask(prompt, 100 * number + k)
        for number, prompt in enumerate(prompts_of_tiny(_PROMPTS))
        for k in range(_IMAGES_PER_PROMPT)
    ]
    return _rate(lambda: synthesizer.generate(tasks, recipe, lambda: None))


def _one_prompt_a_call(dtype: str) -> float:
    def generate() -> None:
        for prompt in prompts_of_tiny(_PROMPTS):
            _plain_call(prompt, dtype)

    return _rate(generate)


def _batched_by_hand(dtype: str) -> float:
    return _rate(lambda: _plain_call(prompts_of_tiny(_PROMPTS), dtype))


def _plain_call(prompts: str | list[str], dtype: str) -> None:
    _pipeline(dtype)(prompts, num_images_per_prompt=_IMAGES_PER_PROMPT, **_call_settings())


def _call_settings() -> dict[str, Any]:
    model = _tiny()
    return {
        "guidance_scale": model.guidance_scale,
        "num_inference_steps": model.num_inference_steps,
        "height": model.generate_px,
        "width": model.generate_px,
        "output_type": "pil",
    }


@cache
def _synthesizer() -> Any:
    from synthrep_generator.diffusion import load_synthesizer

    return load_synthesizer(_tiny(), device="cpu", threads=1)


def _dtype() -> str:
    return str(_synthesizer().dtype)


@cache
def _pipeline(dtype: str) -> Any:
    import diffusers
    import torch
    import transformers
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(
        _tiny().path, local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _overhead_of_a_run(num_prompts: int) -> float:
    with (
        tempfile.TemporaryDirectory() as folder,
        Services(Path(folder), workers=1, api=False, device="cpu", threads=1) as services,
    ):
        paths = DatasetPaths(services.settings.root, "overhead")
        settings = plain_settings(_tiny(), images_per_prompt=_IMAGES_PER_PROMPT)
        accept_prompts(paths, prompts_of_tiny(num_prompts), settings)
        records = wait_for_groups(services, paths, num_prompts)
        runs = runs_done(services, paths.dataset, len(records))
    ended_at = records[-1].created_at.timestamp()
    started_at = datetime.fromisoformat(runs[0]["time"]).timestamp() - runs[0]["seconds"]
    device_s = sum(line["device_s"] for line in runs)
    return float(1 - device_s / (ended_at - started_at))
