"""Multi-positive contrastive losses: pure functions from embeddings and caption ids to a scalar.

The flow ends here: `encoder` gives embeddings, `loop` differentiates what these functions return.
Rows with equal caption ids are positives of each other wherever they stand in the batch. SimCLR is
the same loss with one id per image and two crops of it.

Loss of row i (StableRep, eq. 2-4), over candidates j other than i itself:

    L_i = log sum_j exp(s_ij) - mean over positives j of s_ij,    s_ij = z_i.z_j / temperature

The second term needs only the sum of the embeddings of each caption, O(N D). The first needs all
pairs; it goes through strips of `STRIP_ROWS` rows that are recomputed in backward, so that no
N x N matrix is ever held: memory is O(STRIP_ROWS N), paid for by one more matrix product. On one
process the similarity matrix is symmetric and only its upper half is computed.

Everything runs in fp32, under autocast too: it leaves products alone that write into a given
tensor, as all of these do. They follow torch.set_float32_matmul_precision.

Legend: B rows on this rank, N rows on all ranks, D embedding dim, g gradient of a row's result.
"""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from synthrep_trainer import distributed

STRIP_ROWS = 256
# exp of a logit and the sum of N of them stay normal fp32 numbers up to here, so no maximum has to
# be subtracted; past it (temperature < 1/64) rows are computed whole, each with its own maximum.
_LARGEST_PLAIN_LOGIT = 64.0
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
    if candidates is rows and temperature * _LARGEST_PLAIN_LOGIT >= 1:
        log_normalisers = _SymmetricLogSumExp.apply(rows)
    else:
        first_self = distributed.rank() * len(rows)
        log_normalisers = _RowLogSumExp.apply(rows, candidates, first_self)
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
    sums, counts = _sums_by_id(candidates, distributed.gather(local_candidate_ids), row_ids)
    return _mean_loss(_RowLogSumExp.apply(rows, candidates, None), rows, sums, counts)


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


class _SymmetricLogSumExp(torch.autograd.Function):
    """r_i = log sum over j != i of exp(v_i.v_j), from the upper half of the matrix only.

    With E_ij = exp(v_i.v_j), dr_i/dv_k sums up to  dv_k = sum_j E_kj (u_k + u_j) v_j  where
    u_i = g_i / sum_j E_ij. Needs |v_i|^2 <= _LARGEST_PLAIN_LOGIT.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        sums = torch.zeros_like(vectors[:, 0])
        buffer = _strip_buffer(vectors, vectors)
        for start, stop in _strips(len(vectors)):
            exponentials = _upper_exponentials(vectors, start, stop, buffer)
            sums[start:stop] += exponentials.sum(1)
            sums[stop:] += exponentials[:, stop - start :].sum(0)
        ctx.save_for_backward(vectors, sums)
        return sums.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        vectors, sums = ctx.saved_tensors
        weights = gradient / sums
        result = torch.zeros_like(vectors)
        buffer = _strip_buffer(vectors, vectors)
        weight_buffer = torch.empty_like(buffer)
        for start, stop in _strips(len(vectors)):
            coefficients = _upper_exponentials(vectors, start, stop, buffer)
            pair_weights = _strip(weight_buffer, *coefficients.shape)
            torch.add(weights[start:stop, None], weights[None, start:], out=pair_weights)
            coefficients.mul_(pair_weights)
            result[start:stop].addmm_(coefficients, vectors[start:])
            result[stop:].addmm_(coefficients[:, stop - start :].T, vectors[start:stop])
        return result


class _RowLogSumExp(torch.autograd.Function):
    """r_i = log sum_j exp(row_i.candidate_j), without j = i + first_self unless that is None."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, candidates: Tensor, first_self: int | None) -> Tensor:
        result = torch.empty_like(rows[:, 0])
        buffer = _strip_buffer(rows, candidates)
        for start, stop in _strips(len(rows)):
            logits = _row_logits(rows, candidates, first_self, start, stop, buffer)
            largest = logits.amax(1, keepdim=True)
            result[start:stop] = logits.sub_(largest).exp_().sum(1).log() + largest[:, 0]
        ctx.save_for_backward(rows, candidates, result)
        ctx.first_self = first_self
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, candidates, result = ctx.saved_tensors
        row_gradient = torch.empty_like(rows)
        candidate_gradient = torch.zeros_like(candidates)
        buffer = _strip_buffer(rows, candidates)
        for start, stop in _strips(len(rows)):
            logits = _row_logits(rows, candidates, ctx.first_self, start, stop, buffer)
            softmax = logits.sub_(result[start:stop, None]).exp_()
            coefficients = softmax.mul_(gradient[start:stop, None])
            torch.mm(coefficients, candidates, out=row_gradient[start:stop])
            candidate_gradient.addmm_(coefficients.T, rows[start:stop])
        return row_gradient, candidate_gradient, None


def _strips(num_rows: int) -> list[tuple[int, int]]:
    return [(s, min(s + STRIP_ROWS, num_rows)) for s in range(0, num_rows, STRIP_ROWS)]


def _strip_buffer(rows: Tensor, candidates: Tensor) -> Tensor:
    """Memory of the largest strip: a fresh allocation per strip costs more than its arithmetic."""
    return rows.new_empty(min(STRIP_ROWS, len(rows)) * len(candidates))


def _strip(buffer: Tensor, height: int, width: int) -> Tensor:
    return buffer[: height * width].view(height, width)


def _upper_exponentials(vectors: Tensor, start: int, stop: int, buffer: Tensor) -> Tensor:
    """exp(v_i.v_j) of rows start..stop and columns start..N, 0 on the diagonal."""
    logits = _strip(buffer, stop - start, len(vectors) - start)
    torch.mm(vectors[start:stop], vectors[start:].T, out=logits)
    return logits.exp_().fill_diagonal_(0.0)


def _row_logits(
    rows: Tensor,
    candidates: Tensor,
    first_self: int | None,
    start: int,
    stop: int,
    buffer: Tensor,
) -> Tensor:
    """Logits of rows start..stop against all candidates, -inf where a row would meet itself."""
    logits = _strip(buffer, stop - start, len(candidates))
    torch.mm(rows[start:stop], candidates.T, out=logits)
    if first_self is not None:
        logits[:, first_self + start : first_self + stop].fill_diagonal_(-torch.inf)
    return logits
