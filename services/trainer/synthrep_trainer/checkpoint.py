"""Checkpoints with their tensors: safetensors and JSON, verified when read, never a pickle.

One checkpoint is `<part>.safetensors` for each part (encoder, head, optimizer) and `state.json`:
step, cursor of the data, counts, and what the run was asked for. Random numbers need no state here:
every use of them is seeded from (seed, step, row).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from torch import Tensor

from synthrep_trainer.checkpoint_folders import (
    CheckpointFolder,
    FileEntry,
    Manifest,
    list_checkpoints,
    publish_checkpoint,
)
from synthrep_trainer.errors import NoCheckpointError

_log = logging.getLogger(__name__)
_STATE = "state.json"
_SUFFIX = ".safetensors"

Parts = Mapping[str, Mapping[str, Tensor]]
Weights = Literal["auto", "last", "ema"]


class Checkpoint(NamedTuple):
    """What was saved: tensors by part and name, on the CPU, and the JSON state."""

    path: Path
    step: int
    parts: Parts
    state: dict[str, Any]

    def encoder(self, weights: Weights = "auto") -> Mapping[str, Tensor]:
        """The encoder's tensors: the last ones, or averaged; `auto` averaged where there are any.

        Raises ValueError if there are none and `ema` asks for them, KeyError without an encoder.
        """
        if weights == "last" or (weights == "auto" and "ema_encoder" not in self.parts):
            return self.parts["encoder"]
        if "ema_encoder" not in self.parts:
            raise ValueError(f"{self.path} holds no averaged encoder; weights must not be 'ema'")
        return self.parts["ema_encoder"]


def save_checkpoint(
    folder: Path,
    step: int,
    parts: Parts,
    state: Mapping[str, Any],
    *,
    knn_accuracy: float | None = None,
) -> Path:
    """Write the checkpoint of a step durably and atomically; blocks until it is on disk."""
    files = {
        f"{part}{_SUFFIX}": safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        for part, tensors in parts.items()
    }
    files[_STATE] = json.dumps(state).encode()
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }
    manifest = Manifest(
        step=step, created_at=datetime.now(UTC), files=entries, knn_accuracy=knn_accuracy
    )
    return publish_checkpoint(folder, files, manifest)


def load_checkpoint(folder: CheckpointFolder) -> Checkpoint:
    """Read a checkpoint; raises NoCheckpointError unless every file is what its manifest says."""
    files = folder.read_verified()
    parts = {
        name.removesuffix(_SUFFIX): safetensors.torch.load(data)
        for name, data in files.items()
        if name.endswith(_SUFFIX)
    }
    return Checkpoint(folder.path, folder.step, parts, json.loads(files[_STATE]))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies, None without one; broken ones are logged."""
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(candidate)
        except NoCheckpointError as error:
            _log.error("checkpoint_passed_over", extra={"reason": str(error)})
    return None
