"""Which device a process works on."""

from __future__ import annotations

import torch

from synthrep_trainer import distributed


def choose_device(name: str) -> torch.device:
    """The device of a setting; `auto` is this rank's GPU where there is one, else the CPU."""
    if name == "auto":
        name = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
