"""Parts of a pipeline that must be whole, since the libraries make up what is missing.

transformers fills weights that a file lacks with random numbers, and gives a tokenizer without its
vocabulary, peft takes for half of a LoRA what is in memory: images would be made, of nothing that
the captions say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from synthrep_generator.errors import ModelFilesMissingError
from synthrep_generator.settings import ModelConfig

_PROBE = "a photo of a dog"
_HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
_CLIP = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)


def load_encoders(
    model: ModelConfig, parts: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """The text encoders among the parts of the model's index, on the CPU.

    Raises ModelFilesMissingError if one is not whole, and what names of no class lead to.
    """
    encoders = {}
    for name, (library, class_name) in parts.items():
        kind = _network_class(str(class_name)) if library == "transformers" else None
        if kind is not None:
            folder, dtype = model.path / name, dtypes.get(name, dtypes["default"])
            has_variant = any(folder.glob(f"*.{model.variant}[.-]*safetensors"))
            variant = model.variant if has_variant else None
            encoders[name] = load_network(kind, folder, dtype=dtype, variant=variant)
    return encoders


def load_network(kind: Any, folder: Path, **options: Any) -> Any:
    """A network of transformers, from local safetensors; raises ModelFilesMissingError."""
    try:
        network, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # what a damaged file leads to is any error
        raise ModelFilesMissingError(f"cannot load {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelFilesMissingError(f"{folder} has no {missing[0]}")
    return network


def _network_class(name: str) -> Any:
    kind = getattr(transformers, name)
    is_network = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_network else None


def missing_halves(names: Collection[str]) -> list[str]:
    """The weights that a LoRA lacks beside these: of each pair the library makes up the other."""
    twins = []
    for name in names:
        for one, other in _HALVES:
            if name.endswith(f"{one}.weight"):
                twins.append(name.replace(one, other))
            elif name.endswith(f"{other}.weight"):
                twins.append(name.replace(other, one))
    return sorted(set(twins).difference(names))


def check_parts(pipeline: Any, folder: Path) -> None:
    """Raises ModelFilesMissingError if a tokenizer is not whole, or a network lacks weights."""
    for name, part in pipeline.components.items():
        reason = None
        if isinstance(part, transformers.PreTrainedTokenizerBase):
            encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
            reason = _tokenizer_trouble(part, encoder)
        elif isinstance(part, nn.Module):
            reason = _weights_trouble(part)
        if reason is not None:
            raise ModelFilesMissingError(f"{name} of {folder} {reason}")


def knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has a vocabulary: without one it takes every text for unknown."""
    words = set(tokenizer(_PROBE, add_special_tokens=False).input_ids)
    return not words <= set(tokenizer.all_special_ids)


def _tokenizer_trouble(tokenizer: Any, encoder: Any) -> str | None:
    if not knows_words(tokenizer):
        return "knows no words"
    if isinstance(encoder, _CLIP):
        window = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > window:
            return f"does not cut captions to the {window} tokens that its encoder takes"
    return None


def _weights_trouble(network: nn.Module) -> str | None:
    for name, weight in network.named_parameters():
        if weight.is_meta:
            return f"has no {name}"
    return None
