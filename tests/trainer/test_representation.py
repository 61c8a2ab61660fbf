"""Effective rank and spread tell a rich representation from a collapsed one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from synthrep_trainer import representation
from synthrep_trainer.representation import (
    alignment,
    effective_rank,
    health,
    nearest_of_other_captions,
    neighbour_accuracy,
    principal_plane,
    spread,
    uniformity,
)


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


def unit_rows(num_rows, dim=5):
    rows = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(1))
    return F.normalize(rows.double(), dim=1)


def test_alignment_and_uniformity_are_those_of_all_pairs():
    unit, ids = unit_rows(9), torch.tensor([0, 1, 0, 2, 1, 0, 3, 3, 4])
    distances = {(i, j): (unit[i] - unit[j]).square().sum() for i in range(9) for j in range(i)}
    positives = [d for (i, j), d in distances.items() if ids[i] == ids[j]]
    assert alignment(unit, ids) == pytest.approx(float(sum(positives) / len(positives)))
    kernel = [torch.exp(-2 * d) for d in distances.values()]
    assert uniformity(unit) == pytest.approx(float(torch.stack(kernel).mean().log()))


def test_equal_rows_are_aligned_and_not_uniform():
    rows = unit_rows(1).repeat(6, 1)
    assert alignment(rows, torch.zeros(6, dtype=torch.int64)) == pytest.approx(0, abs=1e-6)
    assert uniformity(rows) == pytest.approx(0, abs=1e-6)


def test_without_positives_there_is_no_alignment():
    assert alignment(unit_rows(4), torch.arange(4)) is None


def test_health_is_of_normalised_embeddings_and_a_bounded_number_of_rows():
    features, unit = torch.randn(3000, 4), unit_rows(3000, 3)
    ids = torch.arange(3000) // 2
    found = health(features, 7 * unit.float(), ids)
    assert found.effective_rank == pytest.approx(effective_rank(features[:2048]))
    assert found.alignment == pytest.approx(alignment(unit[:2048], ids[:2048]), rel=1e-5)
    assert found.uniformity == pytest.approx(uniformity(unit[:2048]), rel=1e-5)


def test_neighbour_accuracy_is_that_of_the_slow_search(monkeypatch):
    monkeypatch.setattr(representation, "_MAX_ROWS", 7)
    rows, ids = (
        torch.randn(40, 3, generator=torch.Generator().manual_seed(2)),
        torch.arange(40) // 4,
    )
    rows = rows + 2 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))[ids]
    hits = 0
    for i in range(40):
        cosines = F.cosine_similarity(rows[i], rows, dim=1)
        cosines[i] = -2
        hits += int(ids[cosines.argmax()] == ids[i])
    assert 4 < hits < 36
    assert neighbour_accuracy(rows, ids) == hits / 40


def test_one_caption_has_no_neighbour_accuracy():
    assert neighbour_accuracy(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)) is None


@pytest.mark.parametrize(("rows", "dim"), [(40, 7), (7, 40), (2, 3)])
def test_the_plane_is_that_of_the_two_largest_singular_values(rows, dim):
    features = np.random.default_rng(0).normal(size=(rows, dim)) * np.arange(1, dim + 1)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    plane = principal_plane(torch.from_numpy(features))
    expected = centred @ axes[:2].T
    np.testing.assert_allclose(plane.coordinates.abs().numpy(), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(plane.shares, values[:2] ** 2 / (values**2).sum(), atol=1e-9)
    farthest = plane.coordinates[plane.coordinates.abs().argmax(dim=0), range(2)]
    assert (farthest >= 0).all()


@pytest.mark.parametrize("features", [torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)])
def test_rows_that_are_equal_have_a_plane_without_variance(features):
    plane = principal_plane(features)
    assert plane.shares == (0.0, 0.0)
    assert torch.equal(plane.coordinates, torch.zeros(len(features), 2).double())


def test_the_nearest_of_other_captions_are_found_one_by_one():
    random = np.random.default_rng(3)
    features, ids = random.normal(size=(30, 5)), random.integers(0, 4, 30)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = nearest_of_other_captions(torch.from_numpy(features), torch.from_numpy(ids), 6)
    for row, near in enumerate(found):
        others = [k for k in range(30) if ids[k] != ids[row]]
        expected = sorted(others, key=lambda k: -unit[k] @ unit[row])[:6]
        assert [k for k, _ in near] == expected
        np.testing.assert_allclose([c for _, c in near], unit[expected] @ unit[row], atol=1e-6)


def test_fewer_rows_of_other_captions_are_all_there_are():
    ids = torch.tensor([1, 1, 2])
    found = nearest_of_other_captions(torch.eye(3), ids, 8)
    assert [[k for k, _ in near] for near in found] == [[2], [2], [0, 1]]
    assert nearest_of_other_captions(torch.eye(2), torch.zeros(2).long(), 8) == [[], []]
