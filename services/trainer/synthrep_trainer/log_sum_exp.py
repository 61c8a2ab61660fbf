"""Logarithms of sums of exponentials of all products of rows, without a matrix of them.

The part of `losses` that sees all pairs. It goes through square tiles that stay in the cache and
are computed again in backward: memory is O(N D), paid for by one more matrix product, half of one
where the matrix is symmetric. Exponentials are powers of two, of vectors scaled to that: on CPUs
`exp` calls MKL as `torch.mm` does, and takes 4.6 times as long as `exp2`.

Legend: N rows, D dimension, v a row, g gradient of a row's result.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from synthrep_trainer.products import product

# Rows and columns of a tile: one that stays in a core's cache, and one that fills a GPU.
TILE_ROWS = 512
GPU_TILE_ROWS = 2048
# exp of a logit and the sum of N of them stay normal fp32 numbers up to here, so no maximum has to
# be subtracted.
LARGEST_PLAIN_LOGIT = 64.0
_LOG2_E, _LN_2 = 1 / math.log(2), math.log(2)


def symmetric_log_sum_exp(vectors: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """r_i = log sum over j != i of exp(v_i.v_j), at the cost of half the matrix.

    Args:
        vectors: fp32 of squared norm at most `LARGEST_PLAIN_LOGIT`; at least two.

    Raises:
        RuntimeError: in backward, with `create_graph=True`.
    """
    result: Tensor = _SymmetricLogSumExp.apply(vectors)
    return result


def row_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    candidates: Float[Tensor, "candidates dim"],
    first_self: int | None,
) -> Float[Tensor, " rows"]:
    """r_i = log sum_j exp(row_i.candidate_j), of fp32 vectors of any norm.

    Args:
        rows: differentiated, as are the candidates.
        candidates: at least one, two with `first_self`.
        first_self: row i leaves candidate i + first_self out, which is itself; None leaves none.

    Raises:
        RuntimeError: in backward, with `create_graph=True`.
    """
    result: Tensor = _RowLogSumExp.apply(rows, candidates, first_self)
    return result


class _SymmetricLogSumExp(torch.autograd.Function):
    """With E_ij = exp(v_i.v_j), dr_i/dv_k sums up to  dv_k = sum_j E_kj (u_k + u_j) v_j  where
    u_i = g_i / sum_j E_ij. E is symmetric: its upper half serves both ways.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        scaled = vectors * math.sqrt(_LOG2_E)
        sums = torch.zeros_like(vectors[:, 0])
        for columns in _blocks(scaled):
            for rows, exponentials in _upper_exponentials(scaled, columns):
                sums[rows] += exponentials.sum(1)
                if rows != columns:
                    sums[columns] += exponentials.sum(0)
        ctx.save_for_backward(scaled, sums)
        return sums.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _refuse_second_order()
        scaled, sums = ctx.saved_tensors
        weights = gradient * math.sqrt(_LN_2) / sums
        result = torch.zeros_like(scaled)
        for columns in _blocks(scaled):
            transposed = torch.zeros_like(scaled[columns].T)
            for rows, coefficients in _upper_exponentials(scaled, columns):
                coefficients.mul_(weights[rows, None] + weights[columns])
                result[rows] += product(coefficients, scaled[columns].T)
                if rows != columns:
                    transposed += product(scaled[rows].T, coefficients.T)
            result[columns] += transposed.T
        return result


class _RowLogSumExp(torch.autograd.Function):
    """Forward carries the largest logit of each row so far, and the sum relative to it; both and
    the result that is kept for backward are to the base 2.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, candidates: Tensor, first_self: int | None) -> Tensor:
        # The lowest finite number, because a tile may hold nothing but -inf.
        largest = torch.full_like(rows[:, 0], torch.finfo(rows.dtype).min)
        sums = torch.zeros_like(largest)
        for columns in _blocks(candidates):
            for block, logits in _row_logits(rows, candidates, columns, first_self):
                before = largest[block].clone()
                largest[block] = torch.maximum(before, logits.amax(1))
                sums[block] *= (before - largest[block]).exp2_()
                sums[block] += logits.sub_(largest[block, None]).exp2_().sum(1)
        result = sums.log2_().add_(largest)
        ctx.save_for_backward(rows, candidates, result)
        ctx.first_self = first_self
        return result * _LN_2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        _refuse_second_order()
        rows, candidates, result = ctx.saved_tensors
        row_gradient = torch.zeros_like(rows)
        # A teacher's candidates need none.
        candidate_gradient = torch.empty_like(candidates) if ctx.needs_input_grad[1] else None
        for columns in _blocks(candidates):
            transposed = torch.zeros_like(candidates[columns].T)
            for block, logits in _row_logits(rows, candidates, columns, ctx.first_self):
                softmax = logits.sub_(result[block, None]).exp2_()
                coefficients = softmax.mul_(gradient[block, None])
                row_gradient[block] += product(coefficients, candidates[columns].T)
                if candidate_gradient is not None:
                    transposed += product(rows[block].T, coefficients.T)
            if candidate_gradient is not None:
                candidate_gradient[columns] = transposed.T
        return row_gradient, candidate_gradient, None


def _refuse_second_order() -> None:
    """In a backward that records a graph; `once_differentiable` sees no dependence on the inputs.

    Raises:
        RuntimeError: the gradient was asked for with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the gradient of this loss cannot be differentiated again")


def _blocks(matrix: Tensor) -> list[slice]:
    side = TILE_ROWS if matrix.device.type == "cpu" else GPU_TILE_ROWS
    return [slice(start, start + side) for start in range(0, len(matrix), side)]


def _upper_exponentials(scaled: Tensor, columns: slice) -> Iterator[tuple[slice, Tensor]]:
    """2^(v_i.v_j) of some columns by tiles of rows, from the top to the diagonal, which is 0.

    The caller may overwrite the tiles.
    """
    for rows in _blocks(scaled[: columns.stop]):
        exponentials = product(scaled[rows], scaled[columns]).exp2_()
        if rows == columns:
            exponentials.fill_diagonal_(0.0)
        yield rows, exponentials


def _row_logits(
    rows: Tensor, candidates: Tensor, columns: slice, first_self: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """row_i.candidate_j to the base 2 of some candidates by tiles of rows, -inf for a row itself.

    The caller may overwrite the tiles.
    """
    scaled = candidates[columns] * _LOG2_E
    for block in _blocks(rows):
        logits = product(rows[block], scaled)
        if first_self is not None:
            logits.diagonal(first_self + block.start - columns.start).fill_(-torch.inf)
        yield block, logits
