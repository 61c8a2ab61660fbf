"""How frozen features are judged: choose on validation, then refit and predict. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int64

from synthrep_trainer.linear_probe import STRENGTHS, fit, fit_each, standardise
from synthrep_trainer.probe_data import Metric
from synthrep_trainer.probe_scores import score

Features = Float32[np.ndarray, "n dim"]
Labels = Int64[np.ndarray, " n"]
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
    labels: Labels
    is_val: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Selection:
    """What validation chose, and the score of every candidate that it saw."""

    chosen: float
    curve: tuple[dict[str, float], ...]


class ProbeProtocol(Protocol):
    """A way to judge features; `version` changes with anything that may change a number."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """Choose on `part.is_val` what was fitted to the rest."""
        ...

    def predict(self, part: FittingPart, chosen: float, test: Features) -> Labels:
        """Labels of `test` by a classifier that saw all of `part`."""
        ...


@dataclass(frozen=True)
class LinearProtocol:
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

    def predict(self, part: FittingPart, chosen: float, test: Features) -> Labels:
        """See ProbeProtocol."""
        train, rows = standardise(part.features, test)
        return fit(train, part.labels, [chosen], device=self.device).predict(rows)[0]


@dataclass(frozen=True)
class NeighbourProtocol:
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

    def predict(self, part: FittingPart, chosen: float, test: Features) -> Labels:
        """See ProbeProtocol; a bank of fewer rows than `chosen` votes as a whole."""
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
