"""Forward and backward of one loss in a fresh process: its processor time, or its memory.

Embeddings are fp32 and normal, captions have eight images each, the temperature is 0.1. Imports
nothing of the project but for our own loss, so that it runs beside each peer too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Name = Literal["ours", "published", "metric_learning", "lightly", "our_tile", "published_tile"]
Loss = Callable[[Tensor, Tensor], Tensor]

DIM = 256
_IMAGES_PER_CAPTION = 8
_TEMPERATURE = 0.1
_WARM_UP_ROWS = 512


def step_s(name: Name, rows: int, ranks: int = 1, steps: int = 1) -> float:
    """Median processor seconds of a step on one thread, the system's share included."""
    loss = prepared(name, ranks)
    embeddings, caption_ids = _draw(rows)

    def one() -> float:
        started = time.process_time()
        _step(loss, embeddings, caption_ids)
        return time.process_time() - started

    return median(one() for _ in range(steps))


def step_megabytes(name: Name, rows: int, ranks: int = 1) -> float:
    """Peak memory of the first step above its inputs, of the whole process."""
    loss = prepared(name, ranks)
    embeddings, caption_ids = _draw(rows)
    before = _kilobytes("VmRSS:")
    _step(loss, embeddings, caption_ids)
    return max(0, _kilobytes("VmHWM:") - before) / 1000


def prepared(name: Name, ranks: int) -> Loss:
    """The loss, after a small step that loads whatever it needs."""
    torch.set_num_threads(1)
    loss = _LOSSES[name](ranks)
    _step(loss, *_draw(_WARM_UP_ROWS))
    return loss


def _draw(rows: int) -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(rows))
    return embeddings, torch.arange(rows) // _IMAGES_PER_CAPTION


def _step(loss: Loss, embeddings: Tensor, caption_ids: Tensor) -> None:
    loss(embeddings.requires_grad_(), caption_ids).backward()
    embeddings.grad = None


def _kilobytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def published(embeddings: Tensor, caption_ids: Tensor, num_rows: int | None = None) -> Tensor:
    """Equations 2 to 4 of StableRep as they stand: softmax of all pairs, and cross-entropy.

    The first `num_rows` rows are this rank's; the others came from the other ranks.
    """
    candidates = F.normalize(embeddings, dim=1)
    rows, ids = candidates[:num_rows], caption_ids[:num_rows]
    is_self = torch.eye(len(rows), len(candidates), dtype=torch.bool)
    logits = (rows @ candidates.T / _TEMPERATURE).masked_fill(is_self, -1e9)
    matches = ((ids[:, None] == caption_ids[None, :]) & ~is_self).float()
    return F.cross_entropy(logits, matches / matches.sum(1, keepdim=True).clamp(min=1))


def _published(ranks: int) -> Loss:
    return published


def _published_tile(ranks: int) -> Loss:
    return lambda embeddings, ids: published(embeddings, ids, len(embeddings) // ranks)


def _ours(ranks: int) -> Loss:
    from synthrep_trainer.losses import multi_positive_contrastive_loss

    return multi_positive_contrastive_loss


def _our_tile(ranks: int) -> Loss:
    from synthrep_trainer.losses import anchored_loss

    def loss(embeddings: Tensor, caption_ids: Tensor) -> Tensor:
        candidates = F.normalize(embeddings, dim=1)
        own = slice(len(embeddings) // ranks)
        anchors = candidates[own] / _TEMPERATURE
        return anchored_loss(
            anchors, caption_ids[own], candidates, caption_ids, own=candidates[own]
        )

    return loss


def _metric_learning(ranks: int) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    loss: Loss = SupConLoss(temperature=_TEMPERATURE)
    return loss


def _lightly(ranks: int) -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=_TEMPERATURE)
    return lambda embeddings, _: loss(*embeddings.chunk(2))


_LOSSES: dict[Name, Callable[[int], Loss]] = {
    "ours": _ours,
    "published": _published,
    "metric_learning": _metric_learning,
    "lightly": _lightly,
    "our_tile": _our_tile,
    "published_tile": _published_tile,
}
