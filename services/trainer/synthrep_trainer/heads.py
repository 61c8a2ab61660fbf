"""The projection head: features to embeddings.

Embeddings are what the loss sees: not normalised here, the loss does it in fp32. Unlike encoders
the head has batch statistics, over the rows of all ranks, and must see a batch whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.randomness import seeded_with


class CrossRankBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics cover the rows of all ranks, one view at a time.

    On one process it is `BatchNorm1d`. `nn.SyncBatchNorm` runs on CUDA alone and knows no views;
    this runs on any device, with two small sums per call. Its state dict is that of `BatchNorm1d`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(
        self, rows: Float[Tensor, "batch features"], num_views: int = 1
    ) -> Float[Tensor, "batch features"]:
        """Normalises row i with the statistics of the rows of view i % `num_views`.

        Running statistics take the views in turn.
        """
        is_alone = distributed.world_size() == 1
        if not self.training or (is_alone and num_views == 1):
            return super().forward(rows)
        views = rows.unflatten(0, (-1, num_views))  # (B / views, views, features)
        if is_alone:
            outputs = [super(CrossRankBatchNorm, self).forward(view) for view in views.unbind(1)]
            return torch.stack(outputs, dim=1).flatten(0, 1)
        num_rows = len(views) * distributed.world_size()
        values = views.float()
        means = distributed.sum_with_gradient(values.sum(0)) / num_rows  # (views, features)
        centred = values - means
        variances = distributed.sum_with_gradient(centred.square().sum(0)) / num_rows
        self._update_running_statistics(means, variances * num_rows / (num_rows - 1))
        normalised = centred * torch.rsqrt(variances + self.eps) * self.weight + self.bias
        return normalised.flatten(0, 1).to(rows.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, means: Tensor, variances: Tensor) -> None:
        for mean, variance in zip(means, variances, strict=True):
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(len(means))


class ProjectionHead(nn.Module):
    """The published three-layer MLP: two hidden layers with BatchNorm and ReLU, a linear output."""

    def __init__(self, width: int, *, hidden: int = 4096, dim: int = 256) -> None:
        """Maps features of `width` to embeddings of `dim`."""
        super().__init__()
        self.linears = nn.ModuleList(
            [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
        )
        self.norms = nn.ModuleList([CrossRankBatchNorm(hidden), CrossRankBatchNorm(hidden)])

    def forward(
        self, features: Float[Tensor, "batch features"], num_views: int = 1
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings, not normalised.

        Args:
            features: in training more than one row a view, over all ranks.
            num_views: 1 takes batch statistics over all rows. The published code takes them over
                one image of each caption: with groups of m adjacent rows, `num_views=m`.

        Raises:
            ValueError: `num_views` does not divide the batch.
        """
        if len(features) % num_views:
            raise ValueError(f"{len(features)} rows do not divide into {num_views} views")
        for linear, norm in zip(self.linears, self.norms, strict=False):
            features = F.relu(norm(linear(features), num_views))
        embeddings: Tensor = self.linears[-1](features)
        return embeddings


def make_projection_head(config: EncoderConfig, width: int, *, seed: int) -> ProjectionHead:
    """A freshly initialised head for features of `width`; the same seed gives the same weights."""
    with seeded_with(seed):
        return ProjectionHead(width, hidden=config.projection_hidden, dim=config.projection_dim)
