"""Encoders that the authors of StableRep and SynCLR published, as runs that are completed.

    torch.save({"model": {"visual.cls_token": ..., "image_mlp.layer1.weight": ..., ...},
                "optimizer": ..., "epoch": ..., "scaler": ..., "args": argparse.Namespace})

is what their training writes. The tensors below `visual.` are those of timm's ViT, with query, key
and value in one matrix; heads, the text tower and the rest are left out. Such a file is a pickle:
torch reads it with an unpickler that knows tensors, plain containers and `argparse.Namespace`, and
stops at anything else, so that nothing in the file is ever called.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synthrep_shared.messages import RunRequest
from synthrep_trainer.checkpoint import save_checkpoint
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.errors import PublishedFileError
from synthrep_trainer.runs import RunFolder, Workplace

_WEIGHTS = ("model", "state_dict")
_PREFIXES = ("visual.", "module.visual.", "")
_CLASSIFIER = "head"
# The published sizes, by width, depth and patch; timm calls them so.
_MODELS = {
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1024, 24, 14): "vit_large_patch14_224",
}


class PublishedEncoder(NamedTuple):
    """What a published file holds: how the encoder is made, and its tensors, fp32."""

    config: EncoderConfig
    tensors: Mapping[str, Tensor]
    origin: dict[str, Any]
    """Name and sha256 of the file, and the epoch that it says."""


def read_published(path: Path) -> PublishedEncoder:
    """The encoder in a published file; nothing in the file is executed.

    Raises:
        PublishedFileError: torch cannot read it without executing it, or it holds no ViT of a
            published size whose tensors are all there and finite.
    """
    content = _load(path)
    tensors = _backbone(content, path)
    config = _config(tensors, path)
    encoder = make_encoder(config, seed=0)
    try:
        encoder.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise PublishedFileError(f"{path} holds no {config.model}: {error}") from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise PublishedFileError(f"{path}: {broken[0]} has values that are no numbers")
    epoch = content.get("epoch")
    origin = {
        "file": path.name,
        "sha256": _sha256(path),
        "epoch": epoch if isinstance(epoch, int) else None,
    }
    return PublishedEncoder(config, encoder.state_dict(), origin)


def import_published(
    path: Path, place: Workplace, *, dataset: str, recipe: Mapping[str, Any] | None = None
) -> RunFolder:
    """A completed run whose only checkpoint is the encoder in a published file.

    Probes and exports take it like any other.

    Args:
        dataset: name for the images that it was trained on.
        recipe: fields of the request by which it was trained; without them the run is one step
            long, for want of a number.

    Raises:
        PublishedFileError: see `read_published`, or the recipe is for another model.
    """
    found = read_published(path)
    shape = {"model": found.config.model, "image_size": found.config.image_size_px}
    if recipe is not None and shape != {name: recipe.get(name) for name in shape}:
        raise PublishedFileError(
            f"{path} holds a {shape['model']} at {shape['image_size']} px, the recipe is for a "
            f"{recipe.get('model')} at {recipe.get('image_size')} px"
        )
    fields = {**(recipe or {**shape, "max_steps": 1}), "dataset": dataset}
    request = RunRequest.model_validate(fields)
    state = {
        "encoder": asdict(found.config),
        "request": request.model_dump(mode="json"),
        "origin": found.origin,
    }
    step = request.max_steps or 0
    return place.adopt_run(
        request,
        lambda run: save_checkpoint(run.checkpoints, step, {"encoder": found.tensors}, state),
    )


def _load(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # raises no OSError for a file that is absent
        path.stat()
        raise PublishedFileError(f"{path} cannot be read safely: no file that torch.save wrote")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that the optimizer's part, two thirds of the file, is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler meets a damaged pickle with any of them
        first_line = str(error).strip().partition("\n")[0]
        raise PublishedFileError(f"{path} cannot be read safely: {first_line}") from error
    if not isinstance(content, dict):
        raise PublishedFileError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _backbone(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of the ViT by timm's names, without a classifier."""
    weights = next((content[key] for key in _WEIGHTS if key in content), None)
    if not isinstance(weights, Mapping):
        raise PublishedFileError(f"{path} has neither {' nor '.join(map(repr, _WEIGHTS))}")
    for prefix in _PREFIXES:
        if isinstance(weights.get(f"{prefix}cls_token"), Tensor):
            return {
                name.removeprefix(prefix): tensor.float()
                for name, tensor in weights.items()
                if isinstance(name, str) and isinstance(tensor, Tensor)
                if name.startswith(prefix) and not name.startswith(f"{prefix}{_CLASSIFIER}")
            }
    raise PublishedFileError(f"{path} holds no ViT: there is no 'visual.cls_token'")


def _config(tensors: Mapping[str, Tensor], path: Path) -> EncoderConfig:
    """Which ViT it is, by the shapes of its tensors."""
    try:
        width, patch = tensors["patch_embed.proj.weight"].shape[::3]
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError, IndexError) as error:
        raise PublishedFileError(f"{path} holds no ViT with patches and positions") from error
    model = _MODELS.get((width, depth, patch))
    if model is None:
        raise PublishedFileError(
            f"{path}: no published ViT has width {width}, depth {depth} and patches of {patch} px"
        )
    return EncoderConfig(model, image_size_px=side * patch)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
