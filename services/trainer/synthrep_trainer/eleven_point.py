"""VOC2007's score: average precision at eleven recalls, for each class one against the rest.

Pure functions. `truth` (n, classes) holds 1, 0, or -1 where an image is too difficult to count.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int64

RECALLS = np.arange(11) / 10
NUM_RESAMPLES = 1000
_CHUNK = 100  # resamples at once; memory is this times the images

Truth = Int64[np.ndarray, "n classes"]
Scores = Float[np.ndarray, "n classes"]


def average_precisions(truth: Truth, scores: Scores) -> Float64[np.ndarray, " classes"]:
    """Of each class; NaN for one that no image has. Equal scores rank as the images do."""
    return _weighted(truth, scores, np.ones((1, len(truth))))[0]


def mean_average_precision(truth: Truth, scores: Scores) -> float:
    """The mean over the classes that some image has; raises ValueError if there is none."""
    return _mean(average_precisions(truth, scores)[None])[0].item()


def bootstrap_interval(truth: Truth, scores: Scores, *, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over images drawn with replacement."""
    rng = np.random.default_rng(seed)
    size = len(truth)
    means = []
    for start in range(0, NUM_RESAMPLES, _CHUNK):
        count = min(_CHUNK, NUM_RESAMPLES - start)
        draws = rng.multinomial(size, np.full(size, 1 / size), count)
        means.append(_mean(_weighted(truth, scores, draws.astype(np.float64))))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _mean(precisions: Float64[np.ndarray, "draws classes"]) -> Float64[np.ndarray, " draws"]:
    is_there = ~np.isnan(precisions)
    if not is_there.any(1).all():
        raise ValueError("no image has any of the classes")
    return np.where(is_there, precisions, 0).sum(1) / is_there.sum(1)


def _weighted(
    truth: Truth, scores: Scores, weights: Float64[np.ndarray, "draws n"]
) -> Float64[np.ndarray, "draws classes"]:
    """Average precision where each image occurs `weights` times."""
    columns = []
    for column in range(truth.shape[1]):
        counted = truth[:, column] >= 0
        order = np.argsort(-scores[counted, column], kind="stable")
        is_positive = truth[counted, column][order] == 1
        occurrences = weights[:, counted][:, order]
        columns.append(_precision_at_recalls(is_positive, occurrences))
    return np.stack(columns, 1)


def _precision_at_recalls(
    is_positive: np.ndarray, occurrences: Float64[np.ndarray, "draws m"]
) -> Float64[np.ndarray, " draws"]:
    """Mean over the recalls of the best precision at that recall or a higher one."""
    found = np.cumsum(occurrences * is_positive, 1)  # (draws, m)
    if not found.shape[1]:
        return np.full(len(found), np.nan)
    total = found[:, -1:]
    precision = found / np.maximum(np.cumsum(occurrences, 1), 1)
    best_from = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    # Whole numbers on both sides, since 0.7 * 10 is not 7.
    reached = [(10 * found >= tenths * total).argmax(1) for tenths in range(len(RECALLS))]
    values = np.stack([best_from[np.arange(len(found)), first] for first in reached]).mean(0)
    return np.where(total[:, 0] > 0, values, np.nan)
