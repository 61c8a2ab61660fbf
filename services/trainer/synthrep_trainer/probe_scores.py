"""What a probe reports, and the statistics in it: pure functions of labels and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict

from synthrep_trainer.probe_data import Metric

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
NUM_RESAMPLES = 10_000
MAX_CONFUSIONS = 1000

Labels = Int64[np.ndarray, " n"]


class Score(BaseModel):
    """A number on the test part with its 95 % interval, all as fractions."""

    model_config = ConfigDict(frozen=True)

    value: float
    ci95: tuple[float, float]
    chosen: float | None = None
    """The hyperparameter that validation chose, None where there is none."""
    hits: str = ""
    """Which test images were named rightly, see `pack_hits`."""


class ClassScore(BaseModel):
    """How one class fared on the test part."""

    model_config = ConfigDict(frozen=True)

    name: str
    n_test: int
    value: float | None
    """Share of its test images that were named rightly, or its average precision; None without
    test images."""


class Confusion(BaseModel):
    """Test images of one class that were taken for another."""

    model_config = ConfigDict(frozen=True)

    truth: str
    predicted: str
    count: int


class ProbeResult(BaseModel):
    """One checkpoint on one labelled set by one protocol."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    protocol: str
    protocol_version: int
    metric: Metric
    value: float
    ci95: tuple[float, float]
    n_test: int
    chosen: float
    """The strength (`linear`), the number of neighbours (`knn`), the learning rate
    (`imagenet-linear`) or the number of shots (`fewshot`)."""
    settings: dict[str, float] = {}
    """What else the protocol was told."""
    curve: tuple[dict[str, float], ...]
    """Each candidate with its score on validation: `{"strength": …, "val": …}`."""
    per_class: tuple[ClassScore, ...]
    confusion: tuple[Confusion, ...] = ()
    """The classes most often taken for another, at most MAX_CONFUSIONS pairs."""
    hits: str = ""
    """Which test images were named rightly, see `pack_hits`; pairs this result with another's."""
    baselines: dict[str, Score] = {}
    """`majority`, `pixels`, `random_init`, through the same protocol on the same images."""
    seconds: float
    """Wall time of everything, features included."""


def score(metric: Metric, truth: Labels, predicted: Labels) -> float:
    """Share of rows that are right, or the mean of that share over the classes of `truth`.

    Raises ValueError for another metric; that of several labels an image is in `eleven_point`.
    """
    if metric == "accuracy":
        return float((truth == predicted).mean())
    if metric != "mean_per_class":
        raise ValueError(f"{metric} needs a protocol for images of several labels")
    num_rows, num_right = _counts(truth, predicted)
    return float((num_right / num_rows).mean())


def score_with_interval(
    metric: Metric, truth: Labels, predicted: Labels, *, seed: int, chosen: float | None = None
) -> Score:
    """The score and its 95 % interval: Wilson's for accuracy, else a bootstrap over test images.

    The bootstrap draws with `seed` within each class, whose sizes are part of the design.
    """
    value = score(metric, truth, predicted)
    if metric == "accuracy":
        interval = wilson_interval(int((truth == predicted).sum()), len(truth))
    else:
        num_rows, num_right = _counts(truth, predicted)
        rng = np.random.default_rng(seed)
        # Drawing a class's rows with replacement and counting the right ones is a binomial draw.
        draws = rng.binomial(num_rows, num_right / num_rows, (NUM_RESAMPLES, len(num_rows)))
        low, high = np.quantile((draws / num_rows).mean(1), (0.025, 0.975))
        interval = (float(low), float(high))
    return Score(value=value, ci95=interval, chosen=chosen, hits=pack_hits(truth, predicted))


def pack_hits(truth: Labels, predicted: Labels) -> str:
    """A bit an image, 1 where it was named rightly: by class, then by place in the set; hex.

    The order is the same for whoever is judged on the set, so that results can be paired.
    """
    order = np.argsort(truth, kind="stable")
    return np.packbits((truth == predicted)[order]).tobytes().hex()


def wilson_interval(num_right: int, num_rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of `num_rows` independent rows."""
    share, z2 = num_right / num_rows, NORMAL_95**2
    centre = (share + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    half = math.sqrt(share * (1 - share) * z2 / num_rows + (z2 / (2 * num_rows)) ** 2)
    half /= 1 + z2 / num_rows
    # Rounding must not leave the share outside of its own interval, at 0 and at 1.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def class_table(truth: Labels, predicted: Labels, names: Sequence[str]) -> tuple[ClassScore, ...]:
    """One row per class, in the order of the class indices."""
    rows = []
    for index, name in enumerate(names):
        right = predicted[truth == index] == index
        value = float(right.mean()) if len(right) else None
        rows.append(ClassScore(name=name, n_test=len(right), value=value))
    return tuple(rows)


def confusions(
    truth: Labels, predicted: Labels, names: Sequence[str], *, limit: int = MAX_CONFUSIONS
) -> tuple[Confusion, ...]:
    """The pairs of classes that were mixed up, the most frequent first."""
    is_wrong = truth != predicted
    pairs = np.stack([truth[is_wrong], predicted[is_wrong]], 1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    return tuple(
        Confusion(truth=names[kinds[i][0]], predicted=names[kinds[i][1]], count=int(counts[i]))
        for i in np.argsort(-counts, kind="stable")[:limit]
    )


def _counts(truth: Labels, predicted: Labels) -> tuple[Labels, Labels]:
    """(rows, right rows) of each class that occurs in `truth`."""
    classes, columns = np.unique(truth, return_inverse=True)
    num_rows = np.bincount(columns, minlength=len(classes))
    return num_rows, np.bincount(columns, weights=truth == predicted).astype(np.int64)
