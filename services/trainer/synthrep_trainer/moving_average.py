"""The moving average of a module's weights: a teacher is made of it, and it often is better itself.

After each update every weight becomes decay * average + (1 - decay) * weight, in fp32. Buffers are
copied as they are.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from synthrep_trainer.parallel import local


class MovingAverage:
    """An averaged copy of some modules, in evaluation mode and without gradients.

    Where the modules are sharded, the copy has to be sharded alike.
    """

    def __init__(self, module: nn.ModuleDict) -> None:
        """Begins as the modules are now."""
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.ModuleDict, decay: float) -> None:
        """Move towards `module`, which has the weights of the module that this began as.

        Args:
            decay: weight of what was averaged so far, 0-1; at 1 nothing moves.
        """
        averages = [local(parameter) for parameter in self.module.parameters()]
        weights = [local(parameter) for parameter in module.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
