"""Modules on several ranks: gradients are averaged in backward, overlapped with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synthrep_trainer import distributed


def replicate(module: nn.Module) -> nn.Module:
    """The module to call in place of `module`, which is itself on one process."""
    if distributed.world_size() == 1:
        return module
    # Running statistics are equal on all ranks already, see CrossRankBatchNorm.
    return DistributedDataParallel(module, broadcast_buffers=False)


def held_back(module: nn.Module) -> AbstractContextManager[None]:
    """A block whose passes through a replicated module add to gradients without averaging them."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
