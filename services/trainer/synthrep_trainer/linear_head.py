"""A fitted linear classifier as it is used and kept: one safetensors file, no code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from safetensors.numpy import save

from synthrep_shared.storage import publish_bytes

FORMAT = "synthrep-linear-head/1"


@dataclass(frozen=True)
class LinearHead:
    """logits = (features - mean) / deviation @ weights + intercepts."""

    mean: Float[np.ndarray, " dim"]
    deviation: Float[np.ndarray, " dim"]
    weights: Float[np.ndarray, "dim classes"]
    intercepts: Float[np.ndarray, " classes"]
    classes: Int64[np.ndarray, " classes"]
    """The label of each column."""

    def logits(self, features: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n classes"]:
        """Scores of each class."""
        return ((features - self.mean) / self.deviation) @ self.weights + self.intercepts

    def predict(self, features: Float[np.ndarray, "n dim"]) -> Int64[np.ndarray, " n"]:
        """The most likely label of each row."""
        return self.classes[self.logits(features).argmax(1)]

    def save(self, path: Path, *, names: tuple[str, ...], protocol: str) -> None:
        """Publish the head at `path`, with the names of the classes in its metadata."""
        tensors = {
            "mean": self.mean,
            "deviation": self.deviation,
            "weights": self.weights,
            "intercepts": self.intercepts,
            "classes": self.classes,
        }
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        told = [names[label] for label in self.classes]
        metadata = {"format": FORMAT, "protocol": protocol, "classes": json.dumps(told)}
        publish_bytes(save(contiguous, metadata), path, replace=True)
