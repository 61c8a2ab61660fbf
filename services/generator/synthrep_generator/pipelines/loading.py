"""From a folder to a Family on a device: trusted classes, safetensors and local files only.

Nothing is fetched and no code is taken from the model's folder.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from synthrep_generator.errors import ModelConfigError, ModelFilesMissingError
from synthrep_generator.model_files import read_index
from synthrep_generator.pipelines.family import Family
from synthrep_generator.pipelines.flow_matching import Flux, StableDiffusion3
from synthrep_generator.pipelines.language_models import PixArt, PixArtSigma, Sana
from synthrep_generator.pipelines.linears import take_onednn
from synthrep_generator.pipelines.parts import check_parts, load_encoders, missing_halves
from synthrep_generator.pipelines.samplers import check_options
from synthrep_generator.pipelines.stable_diffusion import (
    LatentConsistency,
    StableDiffusion,
    StableDiffusionXL,
)
from synthrep_generator.settings import ModelConfig
from synthrep_generator.synthesis import Recipe

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "LatentConsistencyModelPipeline": LatentConsistency,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArtSigma,
    "SanaPipeline": Sana,
}
_TRUSTED_LIBRARIES = ("diffusers", "transformers", None)  # None: the part is absent
_UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_family(model: ModelConfig, device: torch.device) -> Family:
    """The model of a folder on the device, made up as configured.

    Raises ModelFilesMissingError if the folder holds no whole pipeline of a known kind and of
    safetensors, ModelConfigError if what is configured does not fit it.
    """
    _quieten()
    family, parts = _read_index(model)
    unused = parts.keys() & _UNUSED_PARTS
    used = {name: part for name, part in parts.items() if name not in unused}
    dtypes = _choose_dtypes(FAMILIES[family], model, device)
    try:
        encoders = load_encoders(model, used, dtypes)
        pipeline = getattr(diffusers, family).from_pretrained(
            model.path,
            local_files_only=True,
            use_safetensors=True,
            variant=model.variant,
            dtype=dtypes,
            **dict.fromkeys(unused),
            **encoders,
        )
    except ModelFilesMissingError:
        raise
    # What a damaged file leads to is any error, of the tokenizers a bare Exception.
    except Exception as error:
        raise ModelFilesMissingError(f"cannot load {model.path}: {error}") from error
    check_parts(pipeline, model.path)
    pipeline.set_progress_bar_config(disable=True)
    _fuse_loras(pipeline, model)
    loaded = FAMILIES[family](pipeline.to(device))
    _check_defaults(loaded, model)
    _tune(loaded, model)
    return loaded


def choose_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The number format of text encoders and denoiser."""
    if model.dtype != "auto":
        return _DTYPES[model.dtype]
    if device.type == "cuda":
        with torch.cuda.device(device):  # which need not be the current one
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _choose_dtypes(
    family: type[Family], model: ModelConfig, device: torch.device
) -> dict[str, torch.dtype]:
    """Number formats by part."""
    # Decoding in half precision shows as bands; it is a small part of the work.
    dtypes = {"vae": torch.float32, "default": choose_dtype(model, device)}
    if dtypes["default"] == torch.float16 and not family.encodes_in_fp16:
        dtypes["text_encoder"] = torch.bfloat16
    return dtypes


def _cpu_multiplies_bf16() -> bool:
    """Whether bf16 is faster than fp32: a CPU without the instructions takes 50 times as long."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BF16_CAPABILITIES)


def _read_index(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The pipeline's class and its parts; checks that those in use can be trusted."""
    index = read_index(model.path)
    if index is None:
        raise ModelFilesMissingError(f"no readable model_index.json in {model.path}")
    family = index.get("_class_name")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelFilesMissingError(f"{model.path} holds a {family}; expected one of {known}")
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in parts.items():
        if name not in _UNUSED_PARTS and (len(value) != 2 or value[0] not in _TRUSTED_LIBRARIES):
            raise ModelFilesMissingError(f"{model.path}: part {name} comes from {value[:1]}")
    return family, parts


def _fuse_loras(pipeline: Any, model: ModelConfig) -> None:
    """Add each LoRA to the weights, so that it costs nothing at each step."""
    if model.loras and not hasattr(pipeline, "load_lora_weights"):
        raise ModelConfigError(f"a {type(pipeline).__name__} takes no LoRA")
    for lora in model.loras:
        file = model.path / lora.path
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelFilesMissingError(f"cannot read the LoRA {file}: {error}") from error
        if missing := missing_halves(weights):
            raise ModelFilesMissingError(f"the LoRA {file} has no {missing[0]}")
        try:
            pipeline.load_lora_weights(weights)
        except (LookupError, ValueError, RuntimeError) as error:
            raise ModelConfigError(f"the LoRA {file} does not fit the model: {error}") from error
        if not pipeline.get_active_adapters():
            raise ModelConfigError(f"the LoRA {file} has no weights of the model's layers")
        pipeline.fuse_lora(lora_scale=lora.scale)
        pipeline.unload_lora_weights()


def _check_defaults(family: Family, model: ModelConfig) -> None:
    defaults = Recipe(model.guidance_scale, model.num_inference_steps, model.scheduler, "")
    if reason := family.refusal(defaults):
        raise ModelConfigError(f"{model.path}: {reason}")
    check_options(model.scheduler, model.scheduler_options)
    step, side_px = family.step_px, model.generate_px
    if side_px % step:
        raise ModelConfigError(f"generate_px must be a multiple of {step}; is {side_px}")


def _tune(family: Family, model: ModelConfig) -> None:
    pipeline, denoiser = family.pipeline, family.denoiser
    if model.channels_last:
        denoiser.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if model.vae_tiling:
        pipeline.vae.enable_tiling()
    if model.compile:
        denoiser.compile()
    else:
        take_onednn(denoiser)


def _quieten() -> None:
    """Prompts do not belong in logs, nor progress bars."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
