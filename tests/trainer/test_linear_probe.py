"""The solver against scikit-learn and against slow, obvious arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from synthrep_trainer import linear_probe, softmax_path
from synthrep_trainer.linear_probe import STRENGTHS, fit, fit_each, standardise

# From the weak end, where classes come apart, to the strong end, where nothing is learnt.
COMPARED = STRENGTHS[::8]


def problem(seed, *, num_rows, dim, num_classes, shift):
    """Unevenly scaled Gaussian classes; the larger the shift, the more separable."""
    rng = np.random.default_rng(seed)
    labels = np.r_[:num_classes, rng.integers(0, num_classes, num_rows - num_classes)]
    scales = np.exp(rng.normal(size=dim))
    centres = shift * rng.normal(size=(num_classes, dim))
    return rng.normal(size=(num_rows, dim)) * scales + centres[labels], labels


PROBLEMS = {
    "overlapping": problem(0, num_rows=150, dim=6, num_classes=4, shift=0.5),
    "fewer rows than dimensions": problem(1, num_rows=30, dim=61, num_classes=3, shift=1),
    "separable": problem(2, num_rows=200, dim=12, num_classes=7, shift=3),
    "hopeless": problem(3, num_rows=90, dim=5, num_classes=3, shift=0),
    "two classes": problem(4, num_rows=41, dim=10, num_classes=2, shift=0.3),
}


def objective(features, labels, weights, intercepts, strength):
    """The formula, row by row."""
    total = strength / 2 * (weights.astype(float) ** 2).sum()
    for row, label in zip(features, labels, strict=True):
        logits = row @ weights.astype(float) + intercepts
        total += np.logaddexp.reduce(logits) - logits[label]
    return total


def sklearn_objective(features, labels, strength):
    """The converged objective; two columns for two classes, as in the definition."""
    is_binary = labels.max() == 1
    # With two columns of opposite sign, w = 2u has penalty strength / 4 |w|^2.
    model = LogisticRegression(
        C=(2 if is_binary else 1) / strength, solver="newton-cg", tol=1e-9, max_iter=10_000
    ).fit(features, labels)
    weights, intercepts = model.coef_.T, model.intercept_
    if is_binary:
        weights, intercepts = weights * [-0.5, 0.5], intercepts * [-0.5, 0.5]
    return objective(features, labels, weights, intercepts, strength)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_objective_is_within_a_thousandth_of_converged_scikit_learn(name, dtype):
    features, labels = PROBLEMS[name]
    features = features.astype(dtype)
    probe = fit(features, labels, STRENGTHS)
    assert probe.weights.dtype == dtype
    for strength in COMPARED:
        index = STRENGTHS.index(strength)
        ours = objective(features, labels, probe.weights[index], probe.intercepts[index], strength)
        assert ours == pytest.approx(probe.objectives[index], rel=1e-5)
        assert ours <= 1.001 * sklearn_objective(features.astype(float), labels, strength)


@pytest.mark.parametrize("strength", [STRENGTHS[0], STRENGTHS[20], STRENGTHS[-1]])
def test_one_strength_alone_is_solved_as_well_as_on_the_path(strength):
    for features, labels in PROBLEMS.values():
        alone = fit(features, labels, [strength]).objectives[0]
        path = fit(features, labels, STRENGTHS).objectives[STRENGTHS.index(strength)]
        assert alone == pytest.approx(path, rel=1e-3)


def test_predictions_agree_with_scikit_learn():
    features, labels = PROBLEMS["overlapping"]
    fresh, _ = problem(0, num_rows=500, dim=6, num_classes=4, shift=0.5)
    probe = fit(features, labels, [1e-2, 1.0, 100.0])
    for strength, predicted in zip(probe.strengths, probe.predict(fresh), strict=True):
        model = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000).fit(features, labels)
        assert (predicted == model.predict(fresh)).mean() > 0.99


def test_classifiers_come_in_the_order_of_the_strengths():
    features, labels = PROBLEMS["overlapping"]
    mixed = fit(features, labels, [1.0, 1e4, 1e-3, 1.0])
    assert mixed.strengths == (1.0, 1e4, 1e-3, 1.0)
    assert mixed.objectives[1] > mixed.objectives[0] > mixed.objectives[2]
    assert mixed.objectives[0] == mixed.objectives[3]
    assert np.linalg.norm(mixed.weights[1]) < np.linalg.norm(mixed.weights[2])


def test_labels_may_be_any_integers():
    features, labels = PROBLEMS["separable"]
    names = np.array([-3, 0, 5, 6, 90, 91, 1000])
    probe = fit(features, names[labels], [1.0])
    assert probe.classes.tolist() == names.tolist()
    assert (probe.predict(features)[0] == names[labels]).mean() > 0.99


def test_large_and_constant_dimensions_do_no_harm():
    features, labels = PROBLEMS["overlapping"]
    probe = fit(features, labels, [0.1])
    widened = np.c_[features + 1e3, np.ones(len(labels)), np.zeros(len(labels))]
    other = fit(widened, labels, [0.1])
    assert other.objectives[0] == pytest.approx(probe.objectives[0], rel=1e-3)
    assert np.abs(other.weights[0, -2:]).max() < 1e-9


def test_features_without_information_predict_the_most_frequent_class():
    labels = np.array([0, 1, 1, 2, 1])
    probe = fit(np.ones((5, 3), np.float32), labels, [1.0])
    assert probe.predict(np.ones((4, 3), np.float32)).tolist() == [[1, 1, 1, 1]]


def test_fp32_features_that_need_it_are_solved_in_fp64(monkeypatch):
    tried = []

    def solve(features, labels, strengths, **options):
        tried.append((str(features.dtype), strengths))
        for solution in solve_path(features, labels, strengths, **options):
            if len(tried) == 1 and solution.strength < 1:
                raise FloatingPointError
            yield solution

    solve_path = linear_probe.solve_path
    monkeypatch.setattr(linear_probe, "solve_path", solve)
    features, labels = PROBLEMS["separable"]
    probe = fit(features.astype(np.float32), labels, [0.1, 10.0])
    assert tried == [("torch.float32", [10.0, 0.1]), ("torch.float64", [0.1])]
    assert probe.strengths == (0.1, 10.0)


def test_a_problem_that_fp64_cannot_solve_is_an_error(monkeypatch):
    monkeypatch.setattr(softmax_path, "MAX_NEWTON_STEPS", 1)
    features, labels = PROBLEMS["separable"]
    with pytest.raises(FloatingPointError, match="got stuck"):
        fit(features.astype(np.float32), labels, [1e-3])


def test_classifiers_one_at_a_time_come_from_strong_to_weak():
    features, labels = PROBLEMS["overlapping"]
    probes = fit_each(features, labels, [1.0, 1e-3, 1e4, 1.0])
    assert [probe.strengths for probe in probes] == [(1e4,), (1.0,), (1e-3,)]


@pytest.mark.parametrize(
    ("features", "labels", "strengths", "words"),
    [
        (np.ones((3, 2)), [0, 1], [1.0], "expected features"),
        (np.ones(3), [0, 1, 0], [1.0], "expected features"),
        (np.ones((0, 2)), np.zeros(0, int), [1.0], "expected features"),
        (np.ones((2, 2)), [0.0, 1.0], [1.0], "must be integers"),
        (np.array([[1.0], [np.nan]]), [0, 1], [1.0], "finite"),
        (np.array([[1.0], [np.inf]]), [0, 1], [1.0], "finite"),
        (np.ones((2, 2)), [1, 1], [1.0], "at least two classes"),
        (np.ones((2, 2)), [0, 1], [], "positive and finite"),
        (np.ones((2, 2)), [0, 1], [1.0, 0.0], "positive and finite"),
        (np.ones((2, 2)), [0, 1], [float("inf")], "positive and finite"),
        (np.ones((2, 2)), [0, 1], [float("nan")], "positive and finite"),
    ],
)
def test_bad_arguments_are_refused(features, labels, strengths, words):
    with pytest.raises(ValueError, match=words):
        fit(features, labels, strengths)


def test_strengths_are_the_45_of_the_protocol():
    np.testing.assert_allclose(STRENGTHS, np.logspace(-6, 5, 45), rtol=1e-12)


def test_standardise_takes_the_statistics_of_the_first():
    rng = np.random.default_rng(0)
    train = rng.normal(3, 2, (50, 4)).astype(np.float32)
    train[:, 2] = 7.1
    other = rng.normal(size=(9, 4)).astype(np.float32)
    first, second = standardise(train, other)
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose(first.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(first.std(0)[[0, 1, 3]], 1, atol=1e-5)
    np.testing.assert_allclose(first[:, 2], 0, atol=1e-5)
    expected = (other - train.mean(0)) / np.where([True, True, False, True], train.std(0), 1)
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=1e-5)
