"""The linear probe of ImageNet: ten heads trained side by side by SGD, one for each learning rate.

Published: base rates 0.001 … 0.5 times batch / 256, batch 1,024, momentum 0.9, no weight decay, 90
epochs, cosine to 0 at every step, heads from N(0, 0.01), optionally batch normalisation without
parameters before them. Two things are otherwise here. The rate is chosen on a part of train
instead of the validation images that are reported. And features are extracted once from the centre
crop, where the published run crops and mirrors every image anew, which costs 90 extractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.probe_data import Metric
from synthrep_trainer.probe_protocols import (
    Exam,
    Features,
    FittingPart,
    Labels,
    ProbeProtocol,
    Selection,
    Verdict,
    classified,
)
from synthrep_trainer.probe_scores import score

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
REFERENCE_BATCH = 256
MOMENTUM = 0.9
INITIAL_DEVIATION = 0.01
BN_EPS = 1e-6
BN_MOMENTUM = 0.1


@dataclass(frozen=True)
class SgdProtocol(ProbeProtocol):
    """See the module; equal scores go to the smaller rate."""

    batch_norm: bool = False
    epochs: int = 90
    batch_size: int = 1024
    seed: int = 0
    device: str = "cpu"
    name: str = "imagenet-linear"
    version: int = 1

    @property
    def settings(self) -> dict[str, float]:
        """See ProbeProtocol."""
        return {
            "batch_norm": float(self.batch_norm),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
        }

    def select(self, part: FittingPart, metric: Metric) -> Selection:
        """See ProbeProtocol; raises ValueError if every head diverged."""
        heads = self.fit(part.features, part.labels, RATES, rows=np.flatnonzero(~part.is_val))
        val, truth = part.features[part.is_val], part.labels[part.is_val]
        values = [
            score(metric, truth, head.predict(val)) if _is_finite(head) else 0.0 for head in heads
        ]
        if not any(_is_finite(head) for head in heads):
            raise ValueError(
                "every learning rate diverged; batch_norm helps where features are large"
            )
        curve = tuple({"learning_rate": r, "val": v} for r, v in zip(RATES, values, strict=True))
        return Selection(RATES[int(np.argmax(values))], curve)

    def judge(self, part: FittingPart, chosen: float, test: Features, exam: Exam) -> Verdict:
        """See ProbeProtocol."""
        (head,) = self.fit(part.features, part.labels, [chosen])
        return classified(exam, head.predict(test), chosen, head)

    def fit(
        self,
        features: Features,
        labels: Labels,
        rates: Sequence[float],
        *,
        rows: Labels | None = None,
    ) -> list[LinearHead]:
        """One head for each base rate, all trained in one pass over the same batches.

        `rows` are those to train on, all unless given; features may be mapped from a file.
        """
        classes, columns = np.unique(labels, return_inverse=True)
        trainer = _Heads(features.shape[1], len(classes), rates, self)
        table, targets = torch.from_numpy(features), torch.from_numpy(columns.astype(np.int64))
        chosen = torch.arange(len(table)) if rows is None else torch.from_numpy(rows)
        batch_size = min(self.batch_size, len(chosen))
        batches_per_epoch = len(chosen) // batch_size  # the rest of an epoch is left out
        num_steps = self.epochs * batches_per_epoch
        scale = batch_size / REFERENCE_BATCH
        generator = torch.Generator().manual_seed(self.seed)
        step = 0
        for _ in range(self.epochs):
            order = chosen[torch.randperm(len(chosen), generator=generator)]
            for batch in order[: batches_per_epoch * batch_size].split(batch_size):
                decay = (1 + math.cos(math.pi * step / num_steps)) / 2
                trainer.step(table[batch], targets[batch], scale * decay)
                step += 1
        return trainer.heads(classes)


class _Heads:
    """H heads on D features for C classes; their losses are summed, so none sees another."""

    def __init__(
        self, dim: int, num_classes: int, rates: Sequence[float], protocol: SgdProtocol
    ) -> None:
        device, generator = protocol.device, torch.Generator().manual_seed(protocol.seed)
        self._shape = (len(rates), num_classes)
        # The same start for every rate, so that the choice does not hang on the draw.
        start = INITIAL_DEVIATION * torch.randn(dim, 1, num_classes, generator=generator)
        self._weights = start.repeat(1, len(rates), 1).to(device)  # (D, H, C)
        self._intercepts = torch.zeros(self._shape, device=device)  # (H, C)
        self._velocity = torch.zeros_like(self._weights)
        self._intercept_velocity = torch.zeros_like(self._intercepts)
        self._rates = torch.tensor(rates, device=device)[:, None]  # (H, 1)
        self._has_norm, self._device = protocol.batch_norm, device
        self._mean, self._variance = torch.zeros(dim, device=device), torch.ones(dim, device=device)

    def step(
        self, rows: Float[Tensor, "batch dim"], targets: Int64[Tensor, " batch"], factor: float
    ) -> None:
        rows, targets = rows.to(self._device), targets.to(self._device)
        if self._has_norm:
            rows = torch.nn.functional.batch_norm(
                *(rows, self._mean, self._variance),
                training=True,
                momentum=BN_MOMENTUM,
                eps=BN_EPS,
            )
        logits = (rows @ self._weights.flatten(1)).view(-1, *self._shape) + self._intercepts
        gradient = logits.softmax(2)  # (batch, H, C)
        gradient[torch.arange(len(rows), device=gradient.device), :, targets] -= 1
        gradient /= len(rows)
        slope = (rows.T @ gradient.flatten(1)).view_as(self._weights)
        self._velocity.mul_(MOMENTUM).add_(slope)
        self._intercept_velocity.mul_(MOMENTUM).add_(gradient.sum(0))
        self._weights.sub_(factor * self._rates * self._velocity)
        self._intercepts.sub_(factor * self._rates * self._intercept_velocity)

    def heads(self, classes: Int64[np.ndarray, " classes"]) -> list[LinearHead]:
        """As they are used, with the running statistics."""
        mean, deviation = torch.zeros_like(self._mean), torch.ones_like(self._variance)
        if self._has_norm:
            mean, deviation = self._mean, (self._variance + BN_EPS).sqrt()
        return [
            LinearHead(
                mean.cpu().numpy(),
                deviation.cpu().numpy(),
                self._weights[:, head].cpu().numpy(),
                self._intercepts[head].cpu().numpy(),
                classes,
            )
            for head in range(self._shape[0])
        ]


def _is_finite(head: LinearHead) -> bool:
    return bool(np.isfinite(head.weights).all() and np.isfinite(head.intercepts).all())
