"""Multi-positive contrastive losses: pure functions from embeddings and caption ids to a scalar.

The flow ends here: `encoder` gives embeddings, `loop` differentiates what these functions return.
Rows with equal caption ids are positives of each other wherever they stand in the batch. SimCLR is
the same loss with one id per image and two crops of it.

Loss of row i (StableRep, eq. 2-4), over candidates j other than i itself:

    L_i = log sum_j exp(s_ij) - mean over positives j of s_ij,    s_ij = z_i.z_j / temperature

The second term needs only the sum of the embeddings of each caption, O(N D). The first needs all
pairs and is taken in tiles, see `log_sum_exp`, so that no N x N matrix is ever held. Everything
runs in fp32, under autocast too.

Legend: B rows on this rank, N rows on all ranks, D embedding dim.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.log_sum_exp import (
    LARGEST_PLAIN_LOGIT,
    row_log_sum_exp,
    symmetric_log_sum_exp,
)

# With one other row, that row is the only candidate and the only possible positive: the loss is
# identically 0, which fp32 reaches in value but not in gradient.
_FEWEST_USEFUL_ROWS = 3


def multi_positive_contrastive_loss(
    embeddings: Float[Tensor, "batch dim"],
    caption_ids: Integer[Tensor, " batch"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross-entropy between the softmax over all other rows and the uniform law on the positives.

    Embeddings are L2-normalised here, in fp32; the gradient has the dtype of the given tensor. The
    result is the fp32 mean over the rows that have a positive, and 0 with zero gradient where none
    has. Under a process group, rows of all ranks are candidates and the mean is over all of them,
    equal on every rank; gradients follow the convention of `distributed`.

    Args:
        embeddings: as many rows on every rank.
        caption_ids: rows of equal id are positives, in groups of any sizes.
        temperature: above 0; the paper uses 0.1.

    Raises:
        ValueError: shapes do not match, dtypes are not float and integer, or temperature <= 0.
        RuntimeError: in backward, with `create_graph=True`.
    """
    _check_rows(embeddings, caption_ids)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if embeddings.shape[0] * distributed.world_size() < _FEWEST_USEFUL_ROWS:
        return embeddings.float().sum() * 0.0
    rows = _normalised(embeddings) * temperature**-0.5  # (B, D), s_ij = rows_i.rows_j
    candidates = distributed.gather_with_gradient(rows)  # (N, D)
    caption_ids = caption_ids.to(rows.device)
    sums, counts = _sums_by_id(candidates, distributed.gather(caption_ids), caption_ids)
    if candidates is rows and temperature * LARGEST_PLAIN_LOGIT >= 1:
        log_normalisers = symmetric_log_sum_exp(rows)
    else:
        first_self = distributed.rank() * len(rows)
        log_normalisers = row_log_sum_exp(rows, candidates, first_self)
    return _mean_loss(log_normalisers, rows, sums - rows, counts - 1)


def clip_loss(
    image_embeddings: Float[Tensor, "images dim"],
    text_embeddings: Float[Tensor, "texts dim"],
    *,
    image_caption_ids: Integer[Tensor, " images"],
    text_caption_ids: Integer[Tensor, " texts"],
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Mean of the image-to-text and the text-to-image loss, equal caption ids being positives.

    The language term of StableRep+, with one text row for the several images of its caption, and
    plain CLIP where every image has its own. Normalisation, dtype, empty cases and ranks as in
    `multi_positive_contrastive_loss`.

    Args:
        image_embeddings: as many rows on every rank.
        text_embeddings: as many rows on every rank, not necessarily as many as images.
        image_caption_ids: the caption each image was made from.
        text_caption_ids: the caption each text is.
        logit_scale: 1 / temperature, above 0; CLIP learns its logarithm and keeps it below ln 100.

    Raises:
        ValueError: shapes do not match, or dtypes are not float and integer.
    """
    _check_rows(image_embeddings, image_caption_ids)
    _check_rows(text_embeddings, text_caption_ids)
    images, texts = _normalised(image_embeddings), _normalised(text_embeddings)
    image_ids, text_ids = image_caption_ids.to(images.device), text_caption_ids.to(texts.device)
    image_to_text = _cross_loss(images * logit_scale, image_ids, texts, text_ids)
    text_to_image = _cross_loss(texts * logit_scale, text_ids, images, image_ids)
    return (image_to_text + text_to_image) / 2


def anchored_loss(
    anchors: Float[Tensor, "anchors dim"],
    anchor_ids: Integer[Tensor, " anchors"],
    candidates: Float[Tensor, "all dim"],
    candidate_ids: Integer[Tensor, " all"],
    *,
    own: Float[Tensor, "anchors dim"] | None = None,
) -> Float[Tensor, ""]:
    """The core of all of these: anchors of this rank against candidates gathered from all ranks.

    Anchors are unit fp32 vectors over the temperature, candidates unit fp32 vectors; the mean is
    over the anchors of all ranks that have a positive. `own` are this rank's candidates in the
    order of the anchors, where an anchor must not meet its own; at least 2 in all.
    """
    sums, counts = _sums_by_id(candidates, candidate_ids, anchor_ids)
    first_self = None
    if own is not None:
        sums, counts, first_self = sums - own, counts - 1, distributed.rank() * len(own)
    log_normalisers = row_log_sum_exp(anchors, candidates, first_self)
    return _mean_loss(log_normalisers, anchors, sums, counts)


def _check_rows(embeddings: Tensor, caption_ids: Tensor) -> None:
    if embeddings.ndim != 2 or caption_ids.shape != embeddings.shape[:1]:
        raise ValueError(
            "expected embeddings (batch, dim) and caption ids (batch,), got "
            f"{tuple(embeddings.shape)} and {tuple(caption_ids.shape)}"
        )
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be of a float dtype, got {embeddings.dtype}")
    if caption_ids.is_floating_point() or caption_ids.is_complex():
        raise ValueError(f"caption ids must be integers, got {caption_ids.dtype}")


def _normalised(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=1)


def _cross_loss(
    rows: Tensor, row_ids: Tensor, local_candidates: Tensor, local_candidate_ids: Tensor
) -> Tensor:
    """The loss of rows against the candidates of another tower, none of which is the row itself."""
    candidates = distributed.gather_with_gradient(local_candidates)
    return anchored_loss(rows, row_ids, candidates, distributed.gather(local_candidate_ids))


def _sums_by_id(
    candidates: Tensor, candidate_ids: Tensor, row_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """For each row, the sum (B, D) and the number (B,) of the candidates that carry its id."""
    ids, groups = torch.unique(torch.cat([candidate_ids, row_ids]), return_inverse=True)
    candidate_groups, row_groups = groups.split([len(candidate_ids), len(row_ids)])
    sums = candidates.new_zeros(len(ids), candidates.shape[1])
    sums = sums.index_add(0, candidate_groups, candidates)
    counts = candidates.new_zeros(len(ids))
    counts = counts.index_add(0, candidate_groups, candidates.new_ones(len(candidates)))
    return sums.index_select(0, row_groups), counts.index_select(0, row_groups)


def _mean_loss(
    log_normalisers: Tensor, rows: Tensor, positive_sums: Tensor, num_positives: Tensor
) -> Tensor:
    """Mean over the rows of all ranks that have a positive, 0 where none has."""
    positive_logits = (rows * positive_sums).sum(1) / num_positives.clamp(min=1)
    has_positive = num_positives > 0
    losses = torch.where(has_positive, log_normalisers - positive_logits, 0.0)
    num_rows = distributed.sum_with_gradient(has_positive.sum(dtype=losses.dtype))
    return distributed.sum_with_gradient(losses.sum()) / num_rows.clamp(min=1)
