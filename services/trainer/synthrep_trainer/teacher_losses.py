"""Losses against a teacher's targets: pure functions, of all ranks together.

The contrastive one draws a student's rows to the teacher's of the same caption (SynCLR). In masked
modelling (iBOT, Zhou et al. 2022) the student's softmax over prototypes follows the teacher's
assignment.

Legend: M masked tokens on this rank, N on all ranks, K prototypes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.losses import anchored_loss


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


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "tokens prototypes"], temperature: float, iterations: int = 3
) -> Float[Tensor, "tokens prototypes"]:
    """Assignments of this rank's tokens: rows sum to 1, and all prototypes get nearly equal shares.

    Sinkhorn-Knopp on exp(logits / temperature) over the tokens of all ranks, as in SwAV; the ranks
    may have different numbers of tokens, but one of them at least one. In fp32.

    Args:
        logits: cosines, or anything that leaves exp((logits - their maximum) / temperature) in
            fp32.
        iterations: of the two normalisations; the last one is that of the rows.

    Raises:
        ValueError: temperature <= 0, or no iteration.
    """
    if not temperature > 0 or iterations < 1:
        raise ValueError(
            f"expected a temperature above 0 and an iteration, got {temperature} and {iterations}"
        )
    scaled = logits.float() / temperature
    largest = scaled.amax() if len(scaled) else scaled.new_tensor(-torch.inf)
    shares = (scaled - distributed.gather(largest[None]).amax()).exp()  # (M, K)
    for _ in range(iterations):
        totals = distributed.sum_with_gradient(shares.sum(0))  # (K,)
        shares = shares / (totals * shares.shape[1])
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def masked_token_loss(
    logits: Float[Tensor, "tokens prototypes"],
    assignments: Float[Tensor, "tokens prototypes"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(logits / temperature) to the assignments, over all ranks.

    In fp32. With equally many masked tokens an image it is the mean over images of iBOT. 0 where no
    rank has a token. Gradients follow the convention of `distributed`.

    Raises:
        ValueError: temperature <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    log_shares = torch.log_softmax(logits.float() / temperature, dim=1)
    total = -(assignments * log_shares).sum()
    num_tokens = distributed.sum_with_gradient(total.detach().new_tensor(float(len(logits))))
    return distributed.sum_with_gradient(total) / num_tokens.clamp(min=1)
