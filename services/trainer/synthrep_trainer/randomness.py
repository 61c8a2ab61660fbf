"""Blocks whose random numbers follow a seed and leave the global generators as they were.

Every use of random numbers in training is seeded from (seed, step, ...), so that a checkpoint has
no generator's state to hold, and a pass can be made a second time with the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*parts: int, device: torch.device | None = None) -> Iterator[None]:
    """A block in which torch's draws, on the CPU and on `device`, follow the parts of a seed."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*parts))
        yield


@contextmanager
def seeded_with(seed: int) -> Iterator[None]:
    """A block in which initial weights are drawn on the CPU, by torch's generator of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_of(*parts: int) -> int:
    """One seed of 63 bits from several parts, each at least 0."""
    # The number of parts is one of them, since a seed ends as if in zeros.
    low, high = np.random.SeedSequence((len(parts), *parts)).generate_state(2)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
