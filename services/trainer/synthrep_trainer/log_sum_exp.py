"""Logarithms of sums of exponentials of all products of rows, without a matrix of them.

The part of `losses` that sees all pairs. It goes through square tiles that stay in the cache and
are computed again in backward: memory is O(N D), paid for by one more matrix product, half of one
where the matrix is symmetric.

Legend: N rows, D dimension, v a row, g gradient of a row's result.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from synthrep_trainer.products import packed, product

# Rows and columns of a tile: one that stays in a core's cache, and one that fills a GPU.
TILE_ROWS = 512
GPU_TILE_ROWS = 2048
# exp of a logit and the sum of N of them stay normal fp32 numbers up to here, so no maximum has to
# be subtracted.
LARGEST_PLAIN_LOGIT = 64.0


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
        sums = torch.zeros_like(vectors[:, 0])
        for rows, columns, exponentials in _upper_exponentials(vectors):
            sums[rows.at] += exponentials.sum(1)
            if rows is not columns:
                sums[columns.at] += exponentials.sum(0)
        ctx.save_for_backward(vectors, sums)
        return sums.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _refuse_second_order()
        vectors, sums = ctx.saved_tensors
        weights = gradient / sums
        result = torch.zeros_like(vectors)
        for rows, columns, coefficients in _upper_exponentials(vectors):
            coefficients.mul_(weights[rows.at, None] + weights[None, columns.at])
            result[rows.at] += product(packed(coefficients), columns.transposed)
            if rows is not columns:
                result[columns.at] += product(packed(coefficients.T), rows.transposed)
        return result


class _RowLogSumExp(torch.autograd.Function):
    """Forward carries the largest logit of each row so far, and the sum relative to it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, candidates: Tensor, first_self: int | None) -> Tensor:
        # The lowest finite number, because a tile may hold nothing but -inf.
        largest = torch.full_like(rows[:, 0], torch.finfo(rows.dtype).min)
        sums = torch.zeros_like(largest)
        for block, _, logits in _row_logits(rows, candidates, first_self):
            before = largest[block.at].clone()
            largest[block.at] = torch.maximum(before, logits.amax(1))
            sums[block.at] *= (before - largest[block.at]).exp_()
            sums[block.at] += logits.sub_(largest[block.at, None]).exp_().sum(1)
        result = sums.log_().add_(largest)
        ctx.save_for_backward(rows, candidates, result)
        ctx.first_self = first_self
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        _refuse_second_order()
        rows, candidates, result = ctx.saved_tensors
        row_gradient = torch.zeros_like(rows)
        # A teacher's candidates need none.
        candidate_gradient = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        for block, columns, logits in _row_logits(rows, candidates, ctx.first_self):
            softmax = logits.sub_(result[block.at, None]).exp_()
            coefficients = softmax.mul_(gradient[block.at, None])
            row_gradient[block.at] += product(packed(coefficients), columns.transposed)
            if candidate_gradient is not None:
                candidate_gradient[columns.at] += product(packed(coefficients.T), block.transposed)
        return row_gradient, candidate_gradient, None


def _refuse_second_order() -> None:
    """In a backward that records a graph; `once_differentiable` sees no dependence on the inputs.

    Raises:
        RuntimeError: the gradient was asked for with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the gradient of this loss cannot be differentiated again")


class _Block:
    """Rows `at` of a matrix, as `product` takes them: (rows, D) and, transposed, (D, rows)."""

    def __init__(self, matrix: Tensor, at: slice) -> None:
        self.at = at
        self._rows = matrix[at]

    @cached_property
    def packed(self) -> Tensor:
        return packed(self._rows)

    @cached_property
    def transposed(self) -> Tensor:
        return packed(self._rows.T)


def _blocks(matrix: Tensor) -> list[_Block]:
    side = TILE_ROWS if matrix.device.type == "cpu" else GPU_TILE_ROWS
    return [_Block(matrix, slice(s, s + side)) for s in range(0, len(matrix), side)]


def _upper_exponentials(vectors: Tensor) -> Iterator[tuple[_Block, _Block, Tensor]]:
    """exp(v_i.v_j) by tiles of the upper half, 0 on the diagonal; the caller may overwrite them."""
    blocks = _blocks(vectors)
    for index, rows in enumerate(blocks):
        for columns in blocks[index:]:
            exponentials = product(rows.packed, columns.packed).exp_()
            if rows is columns:
                exponentials.fill_diagonal_(0.0)
            yield rows, columns, exponentials


def _row_logits(
    rows: Tensor, candidates: Tensor, first_self: int | None
) -> Iterator[tuple[_Block, _Block, Tensor]]:
    """row_i.candidate_j by tiles, -inf where a row meets itself; the caller may overwrite them."""
    blocks = _blocks(candidates)
    for block in _blocks(rows):
        for columns in blocks:
            logits = product(block.packed, columns.packed)
            if first_self is not None:
                offset = first_self + block.at.start - columns.at.start
                logits.diagonal(offset).fill_(-torch.inf)
            yield block, columns, logits
