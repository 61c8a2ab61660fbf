"""How much of its space a representation uses: pure functions of a matrix of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

# Rows that are judged: the cost of an eigendecomposition and of all pairs stays bounded.
_MAX_ROWS = 2048
_UNIFORMITY_EXPONENT = 2.0


class Health(NamedTuple):
    """Signs of collapse, early and late."""

    effective_rank: float
    alignment: float | None
    uniformity: float


def health(
    features: Float[Tensor, "rows dim"],
    embeddings: Float[Tensor, "rows embedding_dim"],
    caption_ids: Integer[Tensor, " rows"],
) -> Health:
    """All measures, of the first 2,048 rows; features are what is kept, embeddings what is lost."""
    unit = F.normalize(embeddings.detach()[:_MAX_ROWS].double(), dim=1)
    ids = caption_ids[:_MAX_ROWS].to(unit.device)
    return Health(effective_rank(features[:_MAX_ROWS]), alignment(unit, ids), uniformity(unit))


def alignment(
    unit: Float[Tensor, "rows dim"], caption_ids: Integer[Tensor, " rows"]
) -> float | None:
    """Mean squared distance of positives, 0 to 4; None where there are none.

    Wang and Isola 2020, as is `uniformity`. Rows are unit vectors.
    """
    is_positive = caption_ids[:, None] == caption_ids[None, :]
    is_positive.fill_diagonal_(False)
    if not is_positive.any():
        return None
    return float((2 - 2 * (unit @ unit.T)[is_positive]).mean())


def uniformity(unit: Float[Tensor, "rows dim"]) -> float:
    """log of the mean over pairs of exp(-2 * squared distance): from 0, all equal, down to -4.

    Lower is more uniform. Rows are unit vectors, at least two.
    """
    pairs = torch.pdist(unit).square()
    return float(torch.exp(-_UNIFORMITY_EXPONENT * pairs).mean().log())


def neighbour_accuracy(
    features: Float[Tensor, "rows dim"], caption_ids: Integer[Tensor, " rows"]
) -> float | None:
    """How often the row of the largest cosine, a row's own left out, has the row's caption id.

    None for fewer than two captions, where it says nothing. Rows are taken a strip at a time.
    """
    if len(caption_ids.unique()) < 2:
        return None
    unit = F.normalize(features.detach().float(), dim=1)
    hits = 0
    for rows in torch.arange(len(unit), device=unit.device).split(_MAX_ROWS):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        hits += int((caption_ids[cosines.argmax(1)] == caption_ids[rows]).sum())
    return hits / len(unit)


class Plane(NamedTuple):
    """Rows on the two axes along which they differ most."""

    coordinates: Float[Tensor, "rows 2"]
    shares: tuple[float, float]
    """What each axis holds of the variance; 0 where all rows are equal."""


def principal_plane(features: Float[Tensor, "rows dim"]) -> Plane:
    """The first two principal components of the rows as unit vectors, in fp64.

    An axis has two directions: the one is taken in which its farthest row lies.
    """
    unit = F.normalize(features.detach().double(), dim=1)
    centred = unit - unit.mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = F.pad(left * values, (0, 2))[:, :2]  # one row or column has one axis
    farthest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))
    coordinates = coordinates * torch.where(farthest < 0, -1.0, 1.0)
    variances = F.pad(values.square(), (0, 2))
    first, second, *_ = (variances / variances.sum().clamp(min=1e-12)).tolist()
    return Plane(coordinates, (first, second))


def nearest_of_other_captions(
    features: Float[Tensor, "rows dim"], caption_ids: Integer[Tensor, " rows"], count: int
) -> list[list[tuple[int, float]]]:
    """For each row, up to `count` rows of other caption ids with their cosines, nearest first.

    Takes all pairs at once: for the few thousand rows that can be shown.
    """
    unit = F.normalize(features.detach().float(), dim=1)
    cosines = (unit @ unit.T).masked_fill(caption_ids[:, None] == caption_ids, -torch.inf)
    values, others = cosines.sort(dim=1, descending=True, stable=True)
    return [
        [(other, cosine) for other, cosine in zip(*row, strict=True) if cosine > -torch.inf]
        for row in zip(others[:, :count].tolist(), values[:, :count].tolist(), strict=True)
    ]


def effective_rank(features: Float[Tensor, "rows dim"]) -> float:
    """exp of the entropy of the centred features' singular values, as shares of their sum.

    From 1 (all rows on a line) to min(rows - 1, dim); 0 where all rows are equal. Roy and Vetterli
    2007; RankMe (Garrido et al. 2023) is the same without centring.
    """
    centred = features.detach().double() - features.detach().double().mean(dim=0)
    # The smaller of the two Gram matrices has the squared singular values as its eigenvalues.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum()
    if total <= torch.finfo(torch.float32).eps * features.detach().double().norm():
        return 0.0
    shares = values / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def spread(embeddings: Float[Tensor, "rows dim"]) -> float:
    """Half the mean squared distance of the normalised embeddings: 0 if all point one way, to 1."""
    unit = F.normalize(embeddings.detach().double(), dim=1)
    return float(1 - unit.mean(dim=0).square().sum())
