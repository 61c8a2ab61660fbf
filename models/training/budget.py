"""How long a stage trains: minutes or steps, counted over all of its attempts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from torch.optim import Optimizer

_SAVE_EVERY_S = 300.0


class Budget:
    """Steps and seconds that a stage has had, kept as JSON beside its weights."""

    def __init__(self, path: Path, *, minutes: float, max_steps: int | None) -> None:
        """Goes on where `path` says; `max_steps` counts instead of `minutes` where it is given."""
        spent = json.loads(path.read_text()) if path.exists() else {"steps": 0, "seconds": 0}
        self.steps = spent["steps"]
        self._path, self._minutes, self._max_steps = path, minutes, max_steps
        self._started = time.monotonic() - spent["seconds"]
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._started

    @property
    def spent(self) -> float:
        """Fraction that is spent; at 1 the stage is over."""
        if self._max_steps is None:
            return self.seconds / (60 * self._minutes)
        return self.steps / self._max_steps

    def set_lr(self, optimizer: Optimizer, peak: float, *, warmup_steps: int, floor: float) -> None:
        """Linear warm-up, then a cosine over the whole budget down to `floor` times the peak."""
        warmup = min(1.0, (self.steps + 1) / warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent)))
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup * (floor + (1 - floor) * cosine)

    def is_save_due(self) -> bool:
        """Whether five minutes have passed since the last save."""
        return time.monotonic() - self._saved > _SAVE_EVERY_S

    def save(self) -> None:
        """Write what is spent; to be called after the weights are written."""
        self._saved = time.monotonic()
        written = self._path.with_suffix(".part")
        written.write_text(json.dumps({"steps": self.steps, "seconds": self.seconds}))
        written.rename(self._path)
