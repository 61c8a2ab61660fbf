"""Effective rank and spread tell a rich representation from a collapsed one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthrep_trainer.representation import effective_rank, spread


def slow_effective_rank(features: np.ndarray) -> float:
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("rows", "dim"), [(40, 7), (7, 40), (9, 9)])
def test_effective_rank_is_the_entropy_of_singular_values(rows, dim):
    features = np.random.default_rng(0).normal(size=(rows, dim)) * np.arange(1, dim + 1)
    expected = slow_effective_rank(features)
    assert effective_rank(torch.tensor(features)) == pytest.approx(expected, rel=1e-4)


def test_equal_rows_have_rank_0_and_no_spread():
    rows = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).repeat(30, 1)
    assert effective_rank(rows) == 0
    assert spread(rows) == pytest.approx(0, abs=1e-9)


def test_rows_on_a_line_have_rank_1():
    assert effective_rank(torch.arange(5.0)[:, None] * torch.ones(3)) == pytest.approx(1, abs=1e-3)


def test_spread_of_opposite_rows_is_1():
    assert spread(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1)
