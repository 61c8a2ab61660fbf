"""Modules on several ranks: replicated (DDP) or sharded (FSDP2), and what differs between the two.

With `distributed` the only importer of torch.distributed. Gradients are averaged over ranks in
backward, overlapped with it, in both. A sharded module's parameters, gradients and optimizer state
are DTensors, of which each rank holds its part; checkpoints hold them whole, so that a run may go
on with another number of ranks, or replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from synthrep_trainer import distributed

Layout = Literal["replicate", "shard"]


def replicate(module: nn.Module) -> nn.Module:
    """The module to call in place of `module`, which is itself on one process."""
    if distributed.world_size() == 1:
        return module
    # Running statistics are equal on all ranks already, see CrossRankBatchNorm.
    return DistributedDataParallel(module, forward_sync_buffers=False)


def make_mesh(device: torch.device) -> DeviceMesh:
    """All ranks in a row, for `shard`; needs a process group."""
    return init_device_mesh(device.type, (distributed.world_size(),))


def shard(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a module in place, its layers one by one; only whole calls of it work from then on.

    Between calls all of it is in parts, where FSDP2 would leave the outermost parameters whole
    after a call without gradients.
    """
    for layer in (*layers, module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


@contextmanager
def held_back(module: nn.Module) -> Iterator[None]:
    """A block whose passes through a module add to its gradients without averaging them."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them, sharded or not, as one vector; sharded ones on all ranks at once."""
    norms = [torch.nn.utils.get_total_norm(group) for group in _apart(tensors) if group]
    return norms[0] if len(norms) == 1 else torch.stack([whole(norm) for norm in norms]).norm()


def scale_down(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients of this norm down to `limit` where it is larger."""
    for group in _apart(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; then all ranks are to call it alike."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of a sharded one, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The whole tensor, which all ranks have, sharded as `other` is, on its device."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` with whole tensors, into a module that may be sharded."""
    current = module.state_dict()
    module.load_state_dict(
        {
            name: sharded_like(t, current[name]) if name in current else t
            for name, t in tensors.items()
        }
    )


def _apart(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Plain and sharded tensors, which no operation takes together."""
    plain: list[Tensor] = []
    sharded: list[Tensor] = []
    for tensor in tensors:
        (sharded if isinstance(tensor, DTensor) else plain).append(tensor)
    return plain, sharded
