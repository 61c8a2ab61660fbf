"""Linear classifiers for images of several labels: each class against the rest, 11-point mAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int64

from synthrep_trainer.eleven_point import (
    average_precisions,
    bootstrap_interval,
    mean_average_precision,
)
from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.linear_probe import STRENGTHS, fit, statistics
from synthrep_trainer.probe_data import Metric
from synthrep_trainer.probe_protocols import (
    AnyLabels,
    Exam,
    Features,
    FittingPart,
    ProbeProtocol,
    Selection,
    Verdict,
)
from synthrep_trainer.probe_scores import ClassScore, Score


@dataclass(frozen=True)
class OneVersusRestProtocol(ProbeProtocol):
    """Logistic regression of each class on standardised features, one strength for all classes.

    Images that are too difficult for a class take no part in its fit. As `linear` for one label:
    45 strengths, chosen on validation, equal scores go to the stronger regularisation.
    """

    device: str = "cpu"
    name: str = "linear"
    version: int = 1
    is_multi_label: ClassVar[bool] = True

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """See ProbeProtocol."""
        heads = self._heads(part.features[~part.is_val], part.labels[~part.is_val], STRENGTHS)
        val, truth = part.features[part.is_val], part.labels[part.is_val]
        values = [mean_average_precision(truth, head.logits(val)) for head in heads]
        curve = tuple({"strength": s, "val": v} for s, v in zip(STRENGTHS, values, strict=True))
        best = max(range(len(STRENGTHS)), key=lambda i: (values[i], STRENGTHS[i]))
        return Selection(STRENGTHS[best], curve)

    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """See ProbeProtocol."""
        head = self._heads(part.features, part.labels, [chosen])[0]
        logits = head.logits(test)
        precisions = average_precisions(exam.labels, logits)
        per_class = tuple(
            ClassScore(
                name=name,
                n_test=int((exam.labels[:, label] == 1).sum()),
                value=None if np.isnan(precisions[label]) else float(precisions[label]),
            )
            for label, name in enumerate(exam.names)
        )
        return Verdict(_score(exam, logits, chosen), per_class, head=head)

    def majority(self, labels: AnyLabels, exam: Exam) -> Score:
        """What a ranking scores that does not look at the images: the order of the set."""
        return _score(exam, np.zeros(exam.labels.shape), None)

    def _heads(
        self, features: Features, labels: Int64[np.ndarray, "n classes"], strengths: Sequence[float]
    ) -> list[LinearHead]:
        """One head of all classes for each strength; raises ValueError for a class of no contrast.

        Two columns of softmax regression, w and -w, are a logistic regression of 2 w: at twice the
        strength their penalty is that of 2 w.
        """
        mean, deviation = statistics(features)
        rows = (features - mean) / deviation
        num_classes = labels.shape[1]
        weights: Float[np.ndarray, "strengths dim classes"]
        weights = np.empty((len(strengths), features.shape[1], num_classes), np.float32)
        intercepts = np.empty((len(strengths), num_classes), np.float32)
        for column in range(num_classes):
            counted = labels[:, column] >= 0
            if np.unique(labels[counted, column]).size < 2:
                raise ValueError(f"class {column} is on every image for fitting, or on none")
            doubled = [2 * strength for strength in strengths]
            probe = fit(rows[counted], labels[counted, column], doubled, device=self.device)
            weights[..., column] = probe.weights[..., 1] - probe.weights[..., 0]
            intercepts[:, column] = probe.intercepts[:, 1] - probe.intercepts[:, 0]
        classes = np.arange(num_classes)
        return [
            LinearHead(mean, deviation, weights[i], intercepts[i], classes)
            for i in range(len(strengths))
        ]


def _score(exam: Exam, logits: Float[np.ndarray, "n classes"], chosen: float | None) -> Score:
    value = mean_average_precision(exam.labels, logits)
    interval = bootstrap_interval(exam.labels, logits, seed=exam.seed)
    return Score(value=value, ci95=interval, chosen=chosen)
