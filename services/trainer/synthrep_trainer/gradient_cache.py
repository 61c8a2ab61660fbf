"""Exact gradients of a large batch in the memory of a small one (GradCache, Gao et al. 2021).

    1. towers, piece by piece, without graph          -> features of all pieces
    2. heads and loss on all features                 -> gradients of heads, and of the features
    3. towers once more, piece by piece, with graph   -> backward from the cached gradients

The towers have no batch statistics, so a row's features do not depend on the piece it is in, and
the sum over pieces is the gradient of the whole batch; the second pass repeats the random numbers
of the first. The price is one more forward pass of the towers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from synthrep_trainer.objectives import Features, Inputs, Outcome
from synthrep_trainer.parallel import held_back

Pass = Callable[[int], AbstractContextManager[None]]
"""A block in which the towers see piece number i: its random numbers, its precision."""


def backward_in_pieces(
    towers: nn.Module,
    pieces: Sequence[Inputs],
    loss_of: Callable[[Features], Outcome],
    in_pass: Pass,
) -> tuple[Features, Outcome]:
    """Add the gradients of a step; the features come without graph.

    `towers` maps Inputs to Features; on several ranks it averages the gradients of parameters, with
    the last piece.
    """
    features = features_in_pieces(towers, pieces, in_pass)
    cached = Features._make(None if rows is None else rows.requires_grad_() for rows in features)
    outcome = loss_of(cached)
    outcome.loss.backward()
    done = [0] * len(cached)
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        with nullcontext() if is_last else held_back(towers):
            with in_pass(number):
                outputs = towers(piece)
            graph, gradients = _matched(outputs, cached, done)
            torch.autograd.backward(graph, gradients)
    return Features._make(None if rows is None else rows.detach() for rows in cached), outcome


@torch.no_grad()
def features_in_pieces(towers: nn.Module, pieces: Sequence[Inputs], in_pass: Pass) -> Features:
    """Features of all pieces, in order, without graph."""
    found = []
    for number, piece in enumerate(pieces):
        with in_pass(number):
            found.append(towers(piece))
    return Features._make(
        None if rows[0] is None else torch.cat(rows) for rows in zip(*found, strict=True)
    )


def _matched(
    outputs: Features, cached: Features, done: list[int]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """A piece's outputs beside the cached gradients of its rows; moves `done` past them."""
    graph: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for kind, (rows, whole) in enumerate(zip(outputs, cached, strict=True)):
        if rows is None or whole is None:
            continue
        start, done[kind] = done[kind], done[kind] + len(rows)
        assert whole.grad is not None, "the loss depends on all features"
        graph.append(rows)
        gradients.append(whole.grad[start : done[kind]])
    return graph, gradients
