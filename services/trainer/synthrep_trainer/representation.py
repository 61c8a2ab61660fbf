"""How much of its space a representation uses: pure functions of a matrix of features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
    unit = torch.nn.functional.normalize(embeddings.detach().double(), dim=1)
    return float(1 - unit.mean(dim=0).square().sum())
