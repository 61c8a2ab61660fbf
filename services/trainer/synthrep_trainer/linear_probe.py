"""Linear classifiers on frozen features, one per strength of regularisation.

`fit` is the solver that others import; `standardise` and `STRENGTHS` are the rest of the published
protocol: L2-regularised logistic regression, 45 strengths from 1e-6 to 1e5, chosen on validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    by_strength = {
        probe.strengths[0]: probe for probe in fit_each(features, labels, strengths, device=device)
    }
    probes = [by_strength[strength] for strength in strengths]
    return LinearProbe(
        strengths=tuple(strengths),
        classes=probes[0].classes,
        weights=np.concatenate([probe.weights for probe in probes]),
        intercepts=np.concatenate([probe.intercepts for probe in probes]),
        objectives=tuple(probe.objectives[0] for probe in probes),
    )


def fit_each(
    features: Float[np.ndarray, "n dim"],
    labels: Integer[np.ndarray, " n"],
    strengths: Sequence[float],
    *,
    device: str | torch.device = "cpu",
) -> Iterator[LinearProbe]:
    """As `fit`, one classifier at a time from the strongest to the weakest strength, each once.

    A caller that has seen enough stops early and saves the weak end, which is the dearest.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    _require_fittable(features, labels, strengths)
    classes, columns = np.unique(labels, return_inverse=True)
    is_single = features.dtype == np.float32
    rows = torch.from_numpy(features if is_single else features.astype(np.float64)).to(device)
    targets = torch.from_numpy(columns.astype(np.int64)).to(device)
    left = sorted(set(strengths), reverse=True)
    while left:
        try:
            for solution in solve_path(rows, targets, list(left), num_classes=len(classes)):
                left.remove(solution.strength)
                yield _probe(solution, classes)
        except FloatingPointError:
            if rows.dtype == torch.float64:
                raise
            rows = rows.double()


def standardise(
    reference: Float[np.ndarray, "n dim"], *others: Float[np.ndarray, "_ dim"]
) -> tuple[Float[np.ndarray, "_ dim"], ...]:
    """(reference, *others) with the mean and deviation of `reference` taken out of each."""
    mean, deviation = statistics(reference)
    return tuple((features - mean) / deviation for features in (reference, *others))


def statistics(
    features: Float[np.ndarray, "n dim"],
) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, " dim"]]:
    """Mean and deviation of each dimension; 1 for one that is constant, so it is only centred."""
    mean, deviation = features.mean(0), features.std(0)
    # Rounding leaves a constant dimension with a deviation of about eps times its value.
    is_constant = deviation <= 10 * np.finfo(features.dtype).eps * np.abs(mean)
    return mean, np.where(is_constant, 1, deviation).astype(features.dtype)


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


def _probe(solution: Solution, classes: Int64[np.ndarray, " classes"]) -> LinearProbe:
    return LinearProbe(
        strengths=(solution.strength,),
        classes=classes,
        weights=solution.weights.cpu().numpy()[None],
        intercepts=solution.intercepts.cpu().numpy()[None],
        objectives=(solution.objective,),
    )
