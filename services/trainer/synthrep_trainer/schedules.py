"""Values that change over a run, as pure functions of the step.

The loop asks before every optimizer update; `step` counts the updates made so far, from 0. A
resumed run needs no schedule state: the step says it all.
"""

import math
from typing import NamedTuple


class Rates(NamedTuple):
    """What one update uses."""

    lr: float
    weight_decay: float = 0.0
    """Of matrices; the rest does not decay."""
    ema_decay: float | None = None
    """Weight that a moving average keeps of itself; None without one."""


def linear(step: int, *, start: float, end: float, num_steps: int) -> float:
    """A straight line from `start` at step 0 to `end` at step `num_steps`, and `end` after it.

    Args:
        num_steps: updates the change takes; 0 for none, which gives `end` at once.
    """
    return end if step >= num_steps else start + (end - start) * step / num_steps


def cosine(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Half a cosine wave from `start` at step 0 to `end` at step `num_steps`, and `end` after it.

    Serves whatever has no warm-up: weight decay, the EMA of a teacher.

    Args:
        num_steps: updates the change takes, above 0.
    """
    progress = min(step / num_steps, 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine_lr(
    step: int, *, peak_lr: float, warmup_steps: int, total_steps: int, final_lr: float = 0.0
) -> float:
    """Learning rate that rises linearly to its peak, then falls along a cosine (StableRep, SynCLR).

    The first update already moves (`peak_lr / warmup_steps`) and update number `warmup_steps`
    has the peak. From `total_steps` on the rate is `final_lr`.

    Args:
        warmup_steps: updates of the rise, 0 for none.
        total_steps: updates of the whole run, above `warmup_steps`.

    Raises:
        ValueError: the run is not longer than its warm-up, or the step is negative.
    """
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}"
        )
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    return cosine(
        step - warmup_steps, start=peak_lr, end=final_lr, num_steps=total_steps - warmup_steps
    )
