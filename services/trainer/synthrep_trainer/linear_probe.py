"""Linear classifiers on frozen features, one per strength of regularisation.

`fit` is the solver that others import; `standardise` and `STRENGTHS` are the rest of the published
protocol: L2-regularised logistic regression, 45 strengths from 1e-6 to 1e5, chosen on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer

from synthrep_trainer.softmax_path import Solution, solve_path

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (-6 + step / 4) for step in range(45))


@dataclass(frozen=True)
class LinearProbe:
    """The fitted classifiers, in the order of the strengths that `fit` was given."""

    strengths: tuple[float, ...]
    classes: Int64[np.ndarray, " classes"]
    """The label of each column."""
    weights: Float[np.ndarray, "strengths dim classes"]
    intercepts: Float[np.ndarray, "strengths classes"]
    objectives: tuple[float, ...]
    """What was minimised, at its minimum: strength / 2 |W|^2 + sum of cross-entropies (nats)."""

    def logits(
        self, features: Float[np.ndarray, "n dim"], index: int
    ) -> Float[np.ndarray, "n classes"]:
        """Scores of each class by the classifier at `strengths[index]`."""
        return features @ self.weights[index] + self.intercepts[index]

    def predict(self, features: Float[np.ndarray, "n dim"]) -> Int64[np.ndarray, "strengths n"]:
        """The most likely label of each row, by each classifier."""
        best = [self.logits(features, i).argmax(1) for i in range(len(self.strengths))]
        return self.classes[np.stack(best)]


def fit(
    features: Float[np.ndarray, "n dim"],
    labels: Integer[np.ndarray, " n"],
    strengths: Sequence[float],
    *,
    device: str | torch.device = "cpu",
) -> LinearProbe:
    """Fit softmax regression at every strength; strengths are lambda = 1 / C of scikit-learn.

    Minimises lambda / 2 |W|^2 + sum of cross-entropies over W and a free intercept, one column per
    label that occurs, also where there are two. On standardised features the objective is within
    1e-3 of its minimum, relatively, and mostly within 1e-4. Works in the dtype of the features,
    fp32 or fp64, and falls back to fp64 where fp32 does not suffice.
    Raises ValueError on other shapes, non-finite features, fewer than two labels or a strength
    that is not positive and finite; FloatingPointError where fp64 does not suffice either.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    _require_fittable(features, labels, strengths)
    classes, columns = np.unique(labels, return_inverse=True)
    single = features.dtype == np.float32
    rows = torch.from_numpy(features if single else features.astype(np.float64)).to(device)
    targets = torch.from_numpy(columns.astype(np.int64)).to(device)
    try:
        solutions = list(solve_path(rows, targets, strengths, num_classes=len(classes)))
    except FloatingPointError:
        if not single:
            raise
        solutions = list(solve_path(rows.double(), targets, strengths, num_classes=len(classes)))
    by_strength = {solution.strength: solution for solution in solutions}
    return _probe([by_strength[strength] for strength in strengths], classes)


def standardise(
    reference: Float[np.ndarray, "n dim"], *others: Float[np.ndarray, "_ dim"]
) -> tuple[Float[np.ndarray, "_ dim"], ...]:
    """(reference, *others) with the mean and deviation of `reference` taken out of each.

    A dimension that is constant in `reference` is only centred.
    """
    mean, deviation = reference.mean(0), reference.std(0)
    # Rounding leaves a constant dimension with a deviation of about eps times its value.
    is_constant = deviation <= 10 * np.finfo(reference.dtype).eps * np.abs(mean)
    deviation = np.where(is_constant, 1, deviation).astype(reference.dtype)
    return tuple((features - mean) / deviation for features in (reference, *others))


def _require_fittable(features: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
        raise ValueError(
            f"expected features (n, dim) and labels (n,), got {features.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if features.dtype.kind not in "fiu" or not np.isfinite(features).all():
        raise ValueError("features must be finite numbers")
    if (labels == labels[0]).all():
        raise ValueError(f"all labels are {labels[0]}, at least two classes are needed")
    if not len(strengths) or not all(0 < s < float("inf") for s in strengths):
        raise ValueError(f"strengths must be positive and finite, got {list(strengths)}")


def _probe(solutions: Sequence[Solution], classes: Int64[np.ndarray, " classes"]) -> LinearProbe:
    return LinearProbe(
        strengths=tuple(solution.strength for solution in solutions),
        classes=classes,
        weights=np.stack([solution.weights.cpu().numpy() for solution in solutions]),
        intercepts=np.stack([solution.intercepts.cpu().numpy() for solution in solutions]),
        objectives=tuple(solution.objective for solution in solutions),
    )
