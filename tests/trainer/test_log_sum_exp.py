"""Sums over tiles against float64 sums over the whole matrix, rows standing anywhere."""

import pytest
import torch

from synthrep_trainer import log_sum_exp
from synthrep_trainer.log_sum_exp import row_log_sum_exp, symmetric_log_sum_exp


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(log_sum_exp, "TILE_ROWS", 4)


def draw(num_rows, seed, length=1.0):
    return length * torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(seed))


def assert_close_to_float64(function, reference, *inputs):
    """Values and gradients, for unequal weights of the rows."""
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected, result = reference(*exact), function(*leaves)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)
    weights = torch.arange(len(result)) - 3.0
    expected.backward(weights.double())
    result.backward(weights)
    for leaf, other in zip(leaves, exact, strict=True):
        assert (leaf.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


@pytest.mark.parametrize("length", [1.0, 30.0])
@pytest.mark.parametrize("first_self", [None, 0, 1, 6, 8])
def test_a_row_leaves_out_itself_wherever_it_stands(first_self, length):
    def reference(rows, candidates):
        logits = rows @ candidates.T
        if first_self is not None:
            own = torch.arange(len(rows))
            logits = logits.index_put((own, own + first_self), torch.tensor(-torch.inf).double())
        return logits.logsumexp(1)

    def function(rows, candidates):
        return row_log_sum_exp(rows, candidates, first_self)

    assert_close_to_float64(function, reference, draw(9, 0, length), draw(17, 1))


@pytest.mark.parametrize("num_rows", [2, 4, 5, 13])
def test_half_the_matrix_serves_all_of_it(num_rows):
    def reference(vectors):
        logits = vectors @ vectors.T
        return logits.fill_diagonal_(-torch.inf).logsumexp(1)

    assert_close_to_float64(symmetric_log_sum_exp, reference, draw(num_rows, 0))


def test_candidates_without_gradient_leave_that_of_the_rows_alone():
    rows, candidates = draw(9, 0).requires_grad_(), draw(17, 1)
    row_log_sum_exp(rows, candidates, 2).sum().backward()
    alone = rows.grad
    rows.grad = None
    row_log_sum_exp(rows, candidates.requires_grad_(), 2).sum().backward()
    assert torch.equal(rows.grad, alone)
