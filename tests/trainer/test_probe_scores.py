"""Scores and their intervals against slow, obvious arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from synthrep_trainer.probe_scores import (
    class_table,
    pack_hits,
    score,
    score_with_interval,
    wilson_interval,
)

TRUTH = np.array([0] * 10 + [1] * 4 + [3] * 2)
PREDICTED = np.array([0] * 8 + [1] * 2 + [1] * 1 + [0] * 3 + [3] * 2)


def test_accuracy_counts_rows_and_mean_per_class_counts_classes():
    assert score("accuracy", TRUTH, PREDICTED) == 11 / 16
    assert score("mean_per_class", TRUTH, PREDICTED) == pytest.approx((0.8 + 0.25 + 1) / 3)


@pytest.mark.parametrize(("right", "rows"), [(0, 7), (7, 7), (1, 3), (431, 1000), (1, 100_000)])
def test_wilson_interval_is_the_textbook_one(right, rows):
    expected = binomtest(right, rows).proportion_ci(method="wilson")
    assert wilson_interval(right, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_of_accuracy_is_wilsons():
    found = score_with_interval("accuracy", TRUTH, PREDICTED, seed=0, chosen=3.0)
    assert found.value == 11 / 16
    assert found.ci95 == wilson_interval(11, 16)
    assert found.chosen == 3.0


def test_interval_of_mean_per_class_is_a_bootstrap_within_classes():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [200, 50, 20])
    predicted = np.where(rng.random(270) < 0.7, truth, 5)
    found = score_with_interval("mean_per_class", truth, predicted, seed=1)
    means = []
    for _ in range(3_000):
        resampled = [rng.choice((predicted == c)[truth == c], (truth == c).sum()) for c in range(3)]
        means.append(np.mean([rows.mean() for rows in resampled]))
    assert found.ci95 == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.01)
    assert found.ci95[0] < found.value < found.ci95[1]
    again = score_with_interval("mean_per_class", truth, predicted, seed=1)
    assert again == found


def test_class_table_names_every_class_also_without_test_images():
    rows = class_table(TRUTH, PREDICTED, ("ant", "bee", "cat", "dog"))
    assert [(row.name, row.n_test, row.value) for row in rows] == [
        ("ant", 10, 0.8), ("bee", 4, 0.25), ("cat", 0, None), ("dog", 2, 1.0),
    ]  # fmt: skip


def test_hits_are_in_the_order_of_classes_whatever_the_prediction():
    truth = np.array([1, 0, 1, 0, 2])
    packed = pack_hits(truth, np.array([1, 2, 0, 0, 2]))
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))[: len(truth)]
    assert bits.tolist() == [0, 1, 1, 0, 1]
