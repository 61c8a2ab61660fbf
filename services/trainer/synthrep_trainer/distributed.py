"""Ranks, collectives and their gradients: with `parallel` the only importer of torch.distributed.

Every function is a no-op (or the identity) until a process group exists, so the code above it reads
the same on one process and on many. `torchrun` says who is who through the environment; nothing
else reads those variables. Objects travel as JSON, never as pickles.

Gradients follow one convention: backward yields the gradient of the *sum over ranks* of what the
ranks differentiate. DistributedDataParallel then averages over ranks. So a loss whose value is
equal on every rank gives each local tensor `world_size` times its plain gradient, and the averaged
parameter gradient is the one that a single process would compute on the whole batch.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank() -> int:
    """Index of this process among all, 0 on one process."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if _has_group() else 1


def local_rank() -> int:
    """Index of this process on its host, which is also the index of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def has_agent() -> bool:
    """Whether `torchrun` started this process; it watches over it to its end."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def process_group(*, timeout_s: float = 600.0) -> Iterator[None]:
    """Joins the group that `torchrun` describes, and leaves it at the end of the block.

    Without `torchrun`, or with one process, the block runs alone. CPU tensors go through gloo, CUDA
    tensors through NCCL where CUDA is present; this process then uses the device of its local rank.
    A block that ends well waits for the other ranks before it leaves; one that raises does not, so
    that its error is seen at once and the others run into their timeout.

    Args:
        timeout_s: seconds after which a collective that misses a rank raises.

    Raises:
        ValueError: the variables of `torchrun` are incomplete, or a rendezvous address is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
        barrier()
    finally:
        dist.destroy_process_group()


def end_process() -> None:
    """Ends a process that was one of several, with status 0; one that was alone goes on.

    Where gloo made groups within the group, torch's destructors of static objects abort the process
    now and then (1 of 25 ends, status -6), after all is done: they are passed over.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def barrier() -> None:
    """Blocks until every rank has arrived."""
    if world_size() > 1:
        # A CPU collective: dist.barrier() would pick a device, and NCCL guesses which.
        dist.all_reduce(torch.zeros(1))


def broadcast_json(value: Any, *, source: int = 0) -> Any:
    """Gives every rank the value that rank `source` passes; what the others pass is ignored.

    On one process too the value goes through JSON, so that a tuple comes back as a list everywhere.

    Raises:
        TypeError: on the source rank, when the value is not JSON. The other ranks time out.
    """
    if world_size() == 1:
        return json.loads(json.dumps(value))
    payload = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor([len(payload)])
    dist.broadcast(length, source)
    data = torch.empty(int(length.item()), dtype=torch.uint8)
    if rank() == source:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(data, source)
    return json.loads(data.numpy().tobytes())


def gather(tensor: Shaped[Tensor, "local *rest"]) -> Shaped[Tensor, "all *rest"]:
    """Concatenates the equally shaped tensors of all ranks in rank order, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    gathered = tensor.new_empty((tensor.shape[0] * world_size(), *tensor.shape[1:]))
    dist.all_gather_single(gathered, tensor.detach().contiguous())
    return gathered


def gather_with_gradient(tensor: Float[Tensor, "local *rest"]) -> Float[Tensor, "all *rest"]:
    """Concatenates the equally shaped tensors of all ranks; backward sums over ranks."""
    gathered: Tensor = _Gather.apply(tensor) if world_size() > 1 else tensor
    return gathered


def sum_with_gradient(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Adds the tensors of all ranks; backward adds their gradients."""
    total: Tensor = _Sum.apply(tensor) if world_size() > 1 else tensor
    return total


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((gradient.shape[0] // world_size(), *gradient.shape[1:]))
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
