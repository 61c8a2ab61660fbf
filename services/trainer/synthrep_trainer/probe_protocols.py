"""How frozen features are judged: choose on validation, then refit and predict. Pure functions.

What every protocol is and the ones on images of one label that need no training loop; the others
are in `probe_fewshot`, `probe_multi_label` and `probe_sgd`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.linear_probe import STRENGTHS, fit, fit_each, standardise, statistics
from synthrep_trainer.probe_data import Metric
from synthrep_trainer.probe_scores import (
    ClassScore,
    Confusion,
    Score,
    class_table,
    confusions,
    score,
    score_with_interval,
)

Features = Float32[np.ndarray, "n dim"]
Labels = Int64[np.ndarray, " n"]
AnyLabels = Int64[np.ndarray, "n ..."]
"""One class index an image, or a row of 1, 0 and -1 (does not count) over the classes."""
Search = Literal["full", "coarse"]

COARSE_STRIDE = 4  # one decade of STRENGTHS
COARSE_PATIENCE = 3  # decades without a better score that end the coarse search
NUM_NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class FittingPart:
    """Features of train and val together; `is_val` tells them apart."""

    features: Features
    labels: AnyLabels
    is_val: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Selection:
    """What validation chose, and the score of every candidate that it saw."""

    chosen: float
    curve: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Exam:
    """What the test images are judged by."""

    labels: AnyLabels
    names: tuple[str, ...]
    """Of the classes, by index."""
    metric: Metric
    seed: int
    """Of bootstraps and episodes."""


@dataclass(frozen=True)
class Verdict:
    """How one kind of features fared."""

    score: Score
    per_class: tuple[ClassScore, ...]
    confusion: tuple[Confusion, ...] = ()
    head: LinearHead | None = None
    """The classifier, where the protocol makes one."""


class ProbeProtocol(ABC):
    """A way to judge features; `version` changes with anything that may change a number."""

    name: str
    version: int
    is_multi_label: ClassVar[bool] = False
    """Whether it is for images of several labels."""

    @property
    def settings(self) -> dict[str, float]:
        """What it was told beside its name, for the result."""
        return {}

    @abstractmethod
    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """Choose on `part.is_val` what was fitted to the rest."""

    @abstractmethod
    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """Judge `test` by a classifier that saw all of `part`."""

    def majority(self, labels: AnyLabels, exam: Exam) -> Score:
        """What the most frequent of the fitted labels scores everywhere."""
        most = np.full_like(exam.labels, np.bincount(labels).argmax())
        return score_with_interval(exam.metric, exam.labels, most, seed=exam.seed)


def classified(
    exam: Exam, predicted: Labels, chosen: float, head: LinearHead | None = None
) -> Verdict:
    """The verdict on one predicted label an image."""
    truth = exam.labels
    value = score_with_interval(exam.metric, truth, predicted, seed=exam.seed, chosen=chosen)
    return Verdict(
        value,
        class_table(truth, predicted, exam.names),
        confusions(truth, predicted, exam.names),
        head,
    )


@dataclass(frozen=True)
class LinearProtocol(ProbeProtocol):
    """Softmax regression on standardised features; see `linear_probe`.

    The statistics are those of train while choosing and of train and val for the final fit. Equal
    scores go to the stronger regularisation. `full` tries all 45 strengths. `coarse` tries one a
    decade from the strong end, stops three decades after the best, and then tries the six between
    that and its neighbours: half the time or less, since weak strengths are the dearest.
    """

    search: Search = "full"
    device: str = "cpu"
    name: str = "linear"
    version: int = 1

    @property
    def settings(self) -> dict[str, float]:
        """See ProbeProtocol."""
        return {"coarse": 1.0} if self.search == "coarse" else {}

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """See ProbeProtocol."""
        train, val = standardise(part.features[~part.is_val], part.features[part.is_val])
        labels, truth = part.labels[~part.is_val], part.labels[part.is_val]

        def scores(strengths: Sequence[float]) -> Iterator[tuple[float, float]]:
            for probe in fit_each(train, labels, strengths, device=self.device):
                yield probe.strengths[0], score(metric, truth, probe.predict(val)[0])

        tried: dict[float, float] = {}
        if self.search == "full":
            tried.update(scores(STRENGTHS))
        else:
            for strength, value in scores(STRENGTHS[::COARSE_STRIDE]):
                tried[strength] = value
                if sum(other < _best(tried) for other in tried) == COARSE_PATIENCE:
                    break
            centre = STRENGTHS.index(_best(tried))
            around = STRENGTHS[max(0, centre - COARSE_STRIDE + 1) : centre + COARSE_STRIDE]
            tried.update(scores([strength for strength in around if strength not in tried]))
        curve = tuple({"strength": s, "val": tried[s]} for s in sorted(tried))
        return Selection(_best(tried), curve)

    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """See ProbeProtocol."""
        head = self.fit(part, chosen)
        return classified(exam, head.predict(test), chosen, head)

    def fit(self, part: FittingPart, chosen: float) -> LinearHead:
        """The classifier of all of `part`."""
        mean, deviation = statistics(part.features)
        rows = (part.features - mean) / deviation
        probe = fit(rows, part.labels, [chosen], device=self.device)
        return LinearHead(mean, deviation, probe.weights[0], probe.intercepts[0], probe.classes)

    def predict(self, part: FittingPart, chosen: float, test: Features) -> Labels:
        """Labels of `test` by the classifier of all of `part`."""
        return self.fit(part, chosen).predict(test)


@dataclass(frozen=True)
class NeighbourProtocol(ProbeProtocol):
    """The 20 nearest rows by cosine vote, weighted exp(cosine / 0.07); nothing is chosen."""

    name: str = "knn"
    version: int = 1

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """See ProbeProtocol."""
        bank = FittingPart(
            part.features[~part.is_val],
            part.labels[~part.is_val],
            np.zeros((~part.is_val).sum(), bool),
        )
        predicted = self.predict(bank, NUM_NEIGHBOURS, part.features[part.is_val])
        value = score(metric, part.labels[part.is_val], predicted)
        return Selection(NUM_NEIGHBOURS, ({"neighbours": NUM_NEIGHBOURS, "val": value},))

    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """See ProbeProtocol."""
        return classified(exam, self.predict(part, chosen, test), chosen)

    def predict(self, part: FittingPart, chosen: float, test: Features) -> Labels:
        """Labels of `test` by all of `part`; fewer rows than `chosen` vote as a whole."""
        bank, rows = _unit_rows(part.features), _unit_rows(test)
        count = min(int(chosen), len(bank))
        one_hot = np.eye(int(part.labels.max()) + 1, dtype=np.float32)[part.labels]
        predicted = []
        for start in range(0, len(rows), _CHUNK_ROWS):
            cosines = rows[start : start + _CHUNK_ROWS] @ bank.T
            nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            near = np.take_along_axis(cosines, nearest, 1)
            votes = np.exp((near - near.max(1, keepdims=True)) / NEIGHBOUR_TEMPERATURE)
            predicted.append((votes[..., None] * one_hot[nearest]).sum(1).argmax(1))
        return np.concatenate(predicted)


def _best(scores: dict[float, float]) -> float:
    """The candidate with the highest score, the largest among equals."""
    return max(scores, key=lambda candidate: (scores[candidate], candidate))


def _unit_rows(features: Features) -> Features:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(features.dtype).tiny)
