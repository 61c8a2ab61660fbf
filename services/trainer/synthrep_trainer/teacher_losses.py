"""Losses against a teacher's targets: pure functions, of all ranks together.

The contrastive one draws a student's rows to the teacher's of the same caption (SynCLR). In masked
modelling (iBOT, Zhou et al. 2022) the student's softmax over prototypes follows the teacher's
assignment. The M x K logits of either, 100 GB at the paper's sizes, are made piece by piece and
again wherever they are needed.

Legend: M masked tokens on this rank, N on all ranks, K prototypes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from synthrep_trainer import distributed
from synthrep_trainer.losses import anchored_loss

# Logits that are held at a time, 64 MB of them.
PIECE_LOGITS = 2**24


def teacher_contrastive_loss(
    anchors: Float[Tensor, "anchors dim"],
    anchor_ids: Integer[Tensor, " anchors"],
    teacher_embeddings: Float[Tensor, "batch dim"],
    teacher_ids: Integer[Tensor, " batch"],
    temperature: float = 0.1,
    *,
    is_same_image: bool,
) -> Float[Tensor, ""]:
    """The multi-positive loss of a student's rows against a teacher's, which get no gradient.

    As `losses.multi_positive_contrastive_loss` otherwise: both are L2-normalised here in fp32, rows
    of equal id are positives, the teacher's rows of all ranks are candidates, and the mean is over
    the anchors of all ranks that have a positive.

    Args:
        anchors: the student's rows, any number.
        teacher_embeddings: as many rows on every rank.
        is_same_image: anchor i is of the image of teacher row i, which is then left out for it
            from the candidates and from the positives.

    Raises:
        ValueError: ids or images do not match the rows, or temperature <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    num_anchors, num_images = len(anchors), len(teacher_embeddings)
    if (len(anchor_ids), len(teacher_ids)) != (num_anchors, num_images):
        raise ValueError(f"{num_anchors} anchors and {num_images} images need an id each")
    if is_same_image and num_anchors != num_images:
        raise ValueError(f"{num_anchors} anchors are not of {num_images} images")
    if is_same_image and num_images * distributed.world_size() < 2:
        return anchors.float().sum() * 0.0  # no candidate is left
    rows = F.normalize(anchors.float(), dim=1) / temperature
    own = F.normalize(teacher_embeddings.detach().float(), dim=1)
    return anchored_loss(
        rows,
        anchor_ids.to(rows.device),
        distributed.gather(own),
        distributed.gather(teacher_ids.to(rows.device)),
        own=own if is_same_image else None,
    )


class Assignments(NamedTuple):
    """A teacher's assignments of M tokens to K prototypes, as what they are made of."""

    tokens: Float[Tensor, "tokens dim"]
    """Unit vectors."""
    prototypes: Float[Tensor, "prototypes dim"]
    """Unit vectors."""
    factors: Float[Tensor, " prototypes"]
    """What evens out how much the prototypes get."""
    temperature: float

    def shares(self, rows: slice) -> Float[Tensor, "rows prototypes"]:
        """Of some tokens in the prototypes, in fp32: each row sums to 1."""
        shares = self._weights(rows)
        return shares / shares.sum(1, keepdim=True)

    def _weights(self, rows: slice) -> Tensor:
        logits = _cosines(self.tokens[rows], self.prototypes) - 1  # no exponential exceeds 1
        return (logits / self.temperature).exp() * self.factors


@torch.no_grad()
def sinkhorn(
    tokens: Float[Tensor, "tokens dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    temperature: float,
    iterations: int = 3,
) -> Assignments:
    """Assignments of this rank's tokens: rows sum to 1, and all prototypes get nearly equal shares.

    Sinkhorn-Knopp on exp(cosine / temperature) over the tokens of all ranks, as in SwAV; the ranks
    may have different numbers of tokens, but one of them at least one.

    Args:
        tokens: unit vectors.
        prototypes: unit vectors, the same on every rank.
        temperature: far enough from 0 that exp(-2 / temperature) is a number of fp32.
        iterations: of the two normalisations; the last one is that of the rows.

    Raises:
        ValueError: temperature <= 0, or no iteration.
    """
    if not temperature > 0 or iterations < 1:
        raise ValueError(
            f"expected a temperature above 0 and an iteration, got {temperature} and {iterations}"
        )
    factors = prototypes.new_ones(len(prototypes), dtype=torch.float32)
    found = Assignments(tokens, prototypes, factors, temperature)
    for iteration in range(iterations):
        shares_of = found.shares if iteration else found._weights
        totals = torch.zeros_like(factors)
        for rows in _pieces(tokens, prototypes):
            totals += shares_of(rows).sum(0)
        totals = distributed.sum_with_gradient(totals)
        found = found._replace(factors=found.factors / (totals / totals.mean()))
    return found


def masked_token_loss(
    tokens: Float[Tensor, "tokens dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    assignments: Assignments,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(cosine / temperature) to the assignments, over all ranks.

    Softmax and sums are in fp32. With equally many masked tokens an image it is the mean over
    images of iBOT. 0 where no rank has a token. Gradients follow the convention of `distributed`.

    Args:
        tokens: the student's unit vectors, of the tokens that the teacher assigned.
        prototypes: the student's unit vectors.

    Raises:
        ValueError: temperature <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")

    def loss_of(rows: slice) -> Tensor:
        logits = _cosines(tokens[rows], prototypes) / temperature
        return -(assignments.shares(rows) * torch.log_softmax(logits, dim=1)).sum()

    pieces = _pieces(tokens, prototypes)
    if len(pieces) == 1:
        total = loss_of(pieces[0])
    else:
        again = partial(checkpoint, loss_of, use_reentrant=False, preserve_rng_state=False)
        total = torch.stack([again(rows) for rows in pieces]).sum()
    num_tokens = distributed.sum_with_gradient(total.detach().new_tensor(float(len(tokens))))
    return distributed.sum_with_gradient(total) / num_tokens.clamp(min=1)


def _cosines(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """In fp32; under autocast their product is not."""
    return F.linear(tokens, prototypes).float()


def _pieces(tokens: Tensor, prototypes: Tensor) -> list[slice]:
    """Rows whose logits are held at a time; one empty piece of no tokens."""
    size = max(1, PIECE_LOGITS // len(prototypes))
    return [slice(start, start + size) for start in range(0, max(1, len(tokens)), size)]
