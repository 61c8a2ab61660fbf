"""Samplers by the names that requests use, made from a model's own scheduler configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from synthrep_generator.errors import ModelConfigError

_CLASSES = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
    "flow-match": FlowMatchEulerDiscreteScheduler,
}
_FLOW_PREDICTION = "flow_prediction"


def make_scheduler(
    name: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    generators: list[torch.Generator],
) -> Any:
    """A scheduler in its first state; `options` that it does not know are left out.

    One that adds noise takes it from the generators, one for each image, also where the pipeline
    would not pass them on.
    """
    kind = _CLASSES[name]
    known = _parameters(kind)
    wanted = {key: value for key, value in options.items() if key in known}
    scheduler = kind.from_config({**config, **_translated(name, config)}, **wanted)
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.step = functools.partial(scheduler.step, generator=generators)
    return scheduler


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ModelConfigError if the sampler has no such options."""
    unknown = sorted(options.keys() - _parameters(_CLASSES[name]))
    if unknown:
        known = ", ".join(sorted(_parameters(_CLASSES[name])))
        raise ModelConfigError(f"{name} has no option {', '.join(unknown)}; it has {known}")


def max_steps(name: str, config: Mapping[str, Any]) -> int | None:
    """The most steps that a distilled sampler can take; None: as many as one likes."""
    if name != "lcm":
        return None
    default = inspect.signature(LCMScheduler).parameters["original_inference_steps"].default
    return int(config.get("original_inference_steps", default))


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _translated(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's configuration says, or leaves open, in the words of another scheduler."""
    if name == "ddim" and "clip_sample" not in config:
        return {"clip_sample": False}  # its default is for pixels; latents go far beyond 1
    if name == "flow-match" and "flow_shift" in config:
        return {"shift": config["flow_shift"]}
    if name == "dpm++" and "shift" in config:
        return {
            "use_flow_sigmas": True,
            "prediction_type": _FLOW_PREDICTION,
            "flow_shift": config["shift"],
        }
    return {}
