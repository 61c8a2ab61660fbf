"""11-point mAP against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest

from synthrep_trainer.eleven_point import (
    average_precisions,
    bootstrap_interval,
    mean_average_precision,
)


def by_definition(truth, scores):
    """One class, as VOC2007's development kit counts."""
    ranked = [t for _, t in sorted(zip(-scores, truth, strict=True), key=lambda p: p[0]) if t >= 0]
    points = []
    for rank in range(1, len(ranked) + 1):
        found = sum(t == 1 for t in ranked[:rank])
        points.append((found, found / rank))
    total = sum(t == 1 for t in ranked)
    best = [max(p for found, p in points if 10 * found >= k * total) for k in range(11)]
    return sum(best) / 11


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_definition_on_random_cases(seed):
    rng = np.random.default_rng(seed)
    size, classes = int(rng.integers(3, 60)), 4
    truth = rng.integers(-1, 2, (size, classes))
    truth[0] = 1
    scores = rng.normal(size=(size, classes)).round(1)  # with ties
    expected = [by_definition(truth[:, c], scores[:, c]) for c in range(classes)]
    np.testing.assert_allclose(average_precisions(truth, scores), expected, atol=1e-12)
    assert mean_average_precision(truth, scores) == pytest.approx(np.mean(expected))


def test_a_hand_made_case():
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    truth, scores = np.array([[1], [0], [1]]), np.array([[3.0], [2.0], [1.0]])
    assert mean_average_precision(truth, scores) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_difficult_images_do_not_count():
    truth = np.array([[-1], [1], [-1], [0]])
    assert mean_average_precision(truth, np.array([[9.0], [3.0], [2.0], [1.0]])) == 1


def test_a_class_that_no_image_has_is_left_out():
    truth = np.array([[1, 0, -1], [0, 0, -1]])
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert np.isnan(average_precisions(truth, scores)).tolist() == [False, True, True]
    assert mean_average_precision(truth, scores) == 1
    with pytest.raises(ValueError, match="no image has any"):
        mean_average_precision(truth[1:], scores[1:])


def test_the_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (80, 2))
    scores = truth + rng.normal(size=(80, 2))
    low, high = bootstrap_interval(truth, scores, seed=1)
    rows = [rng.integers(0, 80, 80) for _ in range(1000)]
    slow = np.quantile([mean_average_precision(truth[r], scores[r]) for r in rows], (0.025, 0.975))
    np.testing.assert_allclose((low, high), slow, atol=0.02)
    assert low < mean_average_precision(truth, scores) < high
    assert bootstrap_interval(truth, scores, seed=1) == (low, high)
