"""Solutions along the path, judged by autograd and by the bound that strong convexity gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from synthrep_trainer import softmax_path
from synthrep_trainer.softmax_path import solve_path


def data(seed, num_rows=120, dim=9, num_classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    centres = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + 1.5 * noise, labels


def test_solutions_come_from_strong_to_weak_each_once():
    solutions = list(solve_path(*data(0), [1e-3, 1e4, 1e-3, 2.0], num_classes=4))
    assert [solution.strength for solution in solutions] == [1e4, 2.0, 1e-3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strength", [1e4, 10.0, 0.1, 1e-3])
def test_dense_newton_steps_gain_less_than_a_thousandth(seed, strength):
    features, labels = data(seed)
    (solution,) = solve_path(features, labels, [strength], num_classes=4)
    split = solution.weights.numel()

    def objective(flat):
        weights = flat[:split].reshape(solution.weights.shape)
        losses = F.cross_entropy(features @ weights + flat[split:], labels, reduction="sum")
        return losses + strength / 2 * weights.square().sum()

    best = torch.cat([solution.weights.flatten(), solution.intercepts])
    assert float(objective(best)) == pytest.approx(solution.objective, rel=1e-12)
    for _ in range(10):
        slope = torch.autograd.functional.jacobian(objective, best)
        curvature = torch.autograd.functional.hessian(objective, best)
        best = best - torch.linalg.lstsq(curvature, slope).solution
    assert float(slope.norm()) < 1e-6
    assert float(objective(best)) <= solution.objective <= 1.001 * float(objective(best))


def test_fp32_holds_where_every_row_is_certain():
    rng = np.random.default_rng(0)
    labels = torch.arange(90) % 3
    features = torch.from_numpy(8 * np.eye(3, 20)[labels] + rng.normal(size=(90, 20)))
    (single,) = solve_path(features.float(), labels, [1e-6], num_classes=3)
    (double,) = solve_path(features, labels, [1e-6], num_classes=3)
    assert double.objective < 1e-4  # a row's share is below the rounding error of 1 - p
    assert single.objective == pytest.approx(double.objective, rel=1e-3)


def test_fp32_follows_fp64_where_few_rows_carry_the_curvature():
    rng = np.random.default_rng(0)
    labels = torch.arange(300) % 10
    fading = np.exp(-np.arange(64) / 20)
    features = fading * (rng.normal(size=(300, 64)) + 2 * rng.normal(size=(10, 64))[labels])
    features = torch.from_numpy(features)
    (single,) = solve_path(features.float(), labels, [1e-6], num_classes=10)
    (double,) = solve_path(features, labels, [1e-6], num_classes=10)
    assert single.objective == pytest.approx(double.objective, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_dimension_beside_large_ones_keeps_its_weight(dtype):
    features, labels = data(4, dim=6)
    features[:, 1:] = 1e4 * torch.from_numpy(np.random.default_rng(0).normal(size=(120, 5)))
    (alone,) = solve_path(features[:, :1], labels, [0.1], num_classes=4)
    (beside,) = solve_path(features.to(dtype), labels, [0.1], num_classes=4)
    torch.testing.assert_close(beside.weights[0].double(), alone.weights[0], rtol=0.2, atol=0.2)


def test_a_constant_dimension_gets_no_weight():
    features, labels = data(5, dim=3)
    features = torch.cat([features, torch.full((120, 1), 0.1, dtype=torch.float64)], 1).float()
    (solution,) = solve_path(features, labels, [1e-6], num_classes=4)
    assert float(solution.weights[3].abs().max()) < 1e-3


def test_a_dimension_and_its_copy_share_the_weight():
    features, labels = data(2, dim=3)
    (solution,) = solve_path(torch.cat([features, features], 1), labels, [1.0], num_classes=4)
    torch.testing.assert_close(solution.weights[:3], solution.weights[3:])


def test_a_solver_that_cannot_finish_says_so(monkeypatch):
    monkeypatch.setattr(softmax_path, "MAX_NEWTON_STEPS", 1)
    with pytest.raises(FloatingPointError, match="got stuck at F"):
        list(solve_path(*data(3), [1e-3], num_classes=4))
