"""One classifier a class, for images of several labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from synthrep_trainer.eleven_point import average_precisions, mean_average_precision
from synthrep_trainer.linear_probe import STRENGTHS
from synthrep_trainer.probe_multi_label import OneVersusRestProtocol
from synthrep_trainer.probe_protocols import Exam, FittingPart


def made(seed, num_rows=120):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, 6)).astype(np.float32) * 3 + 1
    labels = (features[:, :3] + rng.normal(size=(num_rows, 3)) * 3 > 1).astype(np.int64)
    labels[rng.random(labels.shape) < 0.1] = -1
    return features, labels


@pytest.fixture
def part():
    features, labels = made(0)
    return FittingPart(features, labels, np.arange(len(labels)) >= 80)


def slowly(features, labels, test, strength):
    mean, deviation = features.mean(0), features.std(0)
    columns = []
    for column in range(labels.shape[1]):
        counted = labels[:, column] >= 0
        model = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000)
        model.fit(((features - mean) / deviation)[counted], labels[counted, column])
        columns.append(model.decision_function((test - mean) / deviation))
    return np.stack(columns, 1)


def test_it_is_scikit_learns_logistic_regression_of_each_class(part):
    test, truth = made(1)
    exam = Exam(truth, ("a", "b", "c"), "map_11point", 0)
    verdict = OneVersusRestProtocol().judge(part, 10.0, test, exam)
    expected = slowly(part.features, part.labels, test, 10.0)
    np.testing.assert_allclose(verdict.head.logits(test), expected, atol=0.02)
    assert verdict.score.value == pytest.approx(mean_average_precision(truth, expected), abs=0.01)
    values = [row.value for row in verdict.per_class]
    np.testing.assert_allclose(values, average_precisions(truth, expected), atol=0.02)
    assert [row.n_test for row in verdict.per_class] == (truth == 1).sum(0).tolist()
    assert verdict.score.ci95[0] < verdict.score.value < verdict.score.ci95[1]


def test_one_strength_is_chosen_for_all_classes_by_their_mean(part):
    selection = OneVersusRestProtocol().select(part, "map_11point")
    tried = {point["strength"]: point["val"] for point in selection.curve}
    assert tuple(tried) == STRENGTHS
    assert selection.chosen == max(s for s, v in tried.items() if v == max(tried.values()))
    val, train = part.is_val, ~part.is_val
    expected = slowly(part.features[train], part.labels[train], part.features[val], 1.0)
    assert tried[1.0] == pytest.approx(mean_average_precision(part.labels[val], expected), abs=0.02)


def test_a_class_on_every_image_is_refused(part):
    part.labels[:, 1] = 1
    with pytest.raises(ValueError, match="class 1 is on every image"):
        OneVersusRestProtocol().select(part, "map_11point")
