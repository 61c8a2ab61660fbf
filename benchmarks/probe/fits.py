"""Softmax regression at many strengths by one solver, in a fresh process on one thread.

Features are drawn so that they look like those of an encoder: fp32, correlated, with a spectrum
that falls off, standardised, and classes that overlap. Both sides see the same rows.
"""

from __future__ import annotations

import json
import math
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from synthrep_trainer.linear_probe import fit_each, standardise

Name = Literal["ours", "cold", "warm", "reference"]
"""`reference` is scikit-learn, cold, in fp64."""
Classifier = tuple[float, NDArray[np.float32], NDArray[np.float32], bool]
"""Strength, weights (dim, classes), intercepts, and whether the solver says it converged."""

_TEST_ROWS = 2000
_SHIFT = 0.6  # of the class centres, in deviations of a dimension
_PUBLISHED_ITERATIONS = 1000


class Size(NamedTuple):
    """Rows to fit, dimensions and classes."""

    rows: int
    dim: int
    classes: int


def fit_s(
    name: Name,
    size: Sequence[int],
    strengths: Sequence[float],
    tolerance: float = 1e-4,
    output: str = "",
) -> float:
    """Processor seconds of one solver for all strengths, from the strong to the weak ones.

    `output` names a file for objective, accuracy and convergence by strength, which is not timed.
    `tolerance` is scikit-learn's.
    """
    torch.set_num_threads(1)
    with threadpool_limits(1):
        train, labels, test, truth = draw(Size(*size))
        solver = _solver(name, tolerance)
        list(solver(train[:200], labels[:200] % 3, [100.0]))  # loads whatever it needs
        started = time.process_time()
        found = list(solver(train, labels, strengths))
        seconds = time.process_time() - started
        if output:
            judged = {repr(c[0]): _judge(c, train, labels, test, truth) for c in found}
            Path(output).write_text(json.dumps(judged))
    return seconds


def peak_megabytes(size: Sequence[int], strengths: Sequence[float]) -> float:
    """Peak resident memory of a process that draws features and fits; imports are in it."""
    torch.set_num_threads(1)
    train, labels, _, _ = draw(Size(*size))
    for _ in _ours(train, labels, strengths):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def draw(
    size: Size,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Standardised features and labels to fit, and the same to test on."""
    random = np.random.default_rng(0)
    rows = size.rows + _TEST_ROWS
    labels = random.integers(0, size.classes, rows)
    spectrum = (1 / np.sqrt(np.arange(1, size.dim + 1))).astype(np.float32)
    mixing = random.standard_normal((size.dim, size.dim), np.float32) / math.sqrt(size.dim)
    centres = _SHIFT * random.standard_normal((size.classes, size.dim), np.float32)
    features = random.standard_normal((rows, size.dim), np.float32)
    features += centres[labels]
    features *= spectrum
    features = features @ mixing
    train, test = standardise(features[: size.rows], features[size.rows :])
    return train, labels[: size.rows], test, labels[size.rows :]


def _judge(
    classifier: Classifier,
    train: NDArray[np.float32],
    labels: NDArray[np.int64],
    test: NDArray[np.float32],
    truth: NDArray[np.int64],
) -> dict[str, float | bool]:
    """The objective by its formula in fp64, and the accuracy."""
    strength, weights, intercepts, is_converged = classifier
    logits = train.astype(np.float64) @ weights + intercepts
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    penalty = strength / 2 * np.square(weights, dtype=np.float64).sum()
    predicted = (test @ weights + intercepts).argmax(1)
    return {
        "objective": float(losses.sum() + penalty),
        "accuracy": float((predicted == truth).mean()),
        "converged": is_converged,
    }


_Solver = Callable[[NDArray[np.float32], NDArray[np.int64], Sequence[float]], Iterator[Classifier]]


def _solver(name: Name, tolerance: float) -> _Solver:
    if name == "ours":
        return _ours

    def solver(
        rows: NDArray[np.float32], labels: NDArray[np.int64], strengths: Sequence[float]
    ) -> Iterator[Classifier]:
        if name == "reference":
            rows = rows.astype(np.float64)
        return _scikit_learn(rows, labels, strengths, is_warm=name == "warm", tolerance=tolerance)

    return solver


def _ours(
    rows: NDArray[np.float32], labels: NDArray[np.int64], strengths: Sequence[float]
) -> Iterator[Classifier]:
    for probe in fit_each(rows, labels, strengths):
        yield probe.strengths[0], probe.weights[0], probe.intercepts[0], True


def _scikit_learn(
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    strengths: Sequence[float],
    *,
    is_warm: bool,
    tolerance: float,
) -> Iterator[Classifier]:
    """L-BFGS as the published protocol uses it; warm: each starts from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        solver="lbfgs", max_iter=_PUBLISHED_ITERATIONS, tol=tolerance, warm_start=is_warm
    )
    for strength in sorted(strengths, reverse=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=1 / strength).fit(rows, labels)
        is_converged = bool(model.n_iter_.max() < _PUBLISHED_ITERATIONS)
        yield strength, model.coef_.T.copy(), model.intercept_.copy(), is_converged
