"""Few-shot classification: many small tasks, each solved by the nearest class mean.

An episode draws classes, a few fitting images of each as support and a few test images as queries.
Features are centred by the mean of the support and scaled to unit length; a query goes to the
nearest mean of a class. This is the protocol of El Banani et al. (2023), whose code is public;
that of the paper's own table was not published. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from synthrep_trainer.probe_data import Metric
from synthrep_trainer.probe_protocols import (
    AnyLabels,
    Exam,
    Features,
    FittingPart,
    Labels,
    ProbeProtocol,
    Selection,
    Verdict,
)
from synthrep_trainer.probe_scores import NORMAL_95, ClassScore, Score

NUM_EPISODES = 5000


@dataclass(frozen=True)
class Episode:
    """Rows of one task, class by class."""

    classes: Int64[np.ndarray, " ways"]
    support: Int64[np.ndarray, "ways shots"]
    queries: Int64[np.ndarray, " q"]
    """Fewer than asked for where a class has fewer test images."""
    truth: Int64[np.ndarray, " q"]
    """The place in `classes` of each query."""


@dataclass(frozen=True)
class FewShotProtocol(ProbeProtocol):
    """5-way 5-shot with 6 queries a class; nothing is chosen.

    The value is the mean accuracy of the episodes, whatever the set's own metric, and its interval
    is that of this mean: it tells how well the episodes sample the set, not other test images.
    """

    episodes: int = NUM_EPISODES
    ways: int = 5
    shots: int = 5
    queries: int = 6
    name: str = "fewshot"
    version: int = 1

    @property
    def settings(self) -> dict[str, float]:
        """See ProbeProtocol."""
        return {
            "episodes": self.episodes,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
        }

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """See ProbeProtocol."""
        return Selection(self.shots, ())

    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """See ProbeProtocol; raises ValueError if too few classes have the images."""
        shares = []
        right, asked = np.zeros((2, len(exam.names)))
        for episode in self._draw(part.labels, exam):
            is_right = solve(part.features, test, episode)
            shares.append(is_right.mean())
            labels = episode.classes[episode.truth]
            np.add.at(asked, labels, 1)
            np.add.at(right, labels, is_right)
        mean = float(np.mean(shares))
        half = NORMAL_95 * float(np.std(shares, ddof=1)) / len(shares) ** 0.5
        interval = (max(0.0, mean - half), min(1.0, mean + half))
        per_class = tuple(
            ClassScore(
                name=name,
                n_test=int((exam.labels == label).sum()),
                value=float(right[label] / asked[label]) if asked[label] else None,
            )
            for label, name in enumerate(exam.names)
        )
        return Verdict(Score(value=mean, ci95=interval, chosen=chosen), per_class)

    def majority(self, labels: AnyLabels, exam: Exam) -> Score:
        """Chance, exactly: an episode's classes have equally many supporters."""
        return Score(value=1 / self.ways, ci95=(1 / self.ways, 1 / self.ways))

    def _draw(self, labels: Labels, exam: Exam) -> Iterator[Episode]:
        """The episodes, which depend on the labels and the seed alone."""
        counts = np.bincount(labels, minlength=len(exam.names))
        there = np.flatnonzero(counts >= self.shots)
        there = there[np.isin(there, exam.labels)]
        if len(there) < self.ways:
            raise ValueError(
                f"{self.ways}-way {self.shots}-shot needs {self.ways} classes with {self.shots} "
                f"images for fitting and one for test, there are {len(there)}"
            )
        fitting = {label: np.flatnonzero(labels == label) for label in there}
        testing = {label: np.flatnonzero(exam.labels == label) for label in there}
        rng = np.random.default_rng(exam.seed)
        for _ in range(self.episodes):
            classes = rng.choice(there, self.ways, replace=False)
            support = [rng.choice(fitting[c], self.shots, replace=False) for c in classes]
            queries = [
                rng.choice(testing[c], min(self.queries, len(testing[c])), replace=False)
                for c in classes
            ]
            truth = np.repeat(np.arange(self.ways), [len(rows) for rows in queries])
            yield Episode(classes, np.stack(support), np.concatenate(queries), truth)


def solve(fitting: Features, test: Features, episode: Episode) -> Bool[np.ndarray, " q"]:
    """Which queries of an episode are nearest to the mean of their own class."""
    support, queries = fitting[episode.support], test[episode.queries]
    centre = support.mean((0, 1))
    means = _unit(support - centre).mean(1)  # (ways, dim)
    rows = _unit(queries - centre)
    # |q - m|^2 without |q|^2, which is the same for every m.
    distances = (means**2).sum(1) - 2 * rows @ means.T
    found: Bool[np.ndarray, " q"] = distances.argmin(1) == episode.truth
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.finfo(rows.dtype).tiny))
