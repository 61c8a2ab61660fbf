"""Vision transformer and projection head: images to features to embeddings. Sole importer of timm.

Features are what a run is for: the class token after the final norm, which probes and exports read.
Embeddings are what the loss sees: the output of the projection head, not normalised (the loss
normalises in fp32). Encoder and head are separate modules, because the encoder has no batch
statistics and may see a batch in pieces, while the head has them and must see it whole.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from synthrep_trainer import distributed

# Our own small models, as timm models with other arguments, so that timm alone can load an export.
_OWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_synthrep_tiny": (
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
}
_VIT_MODULES = ("vision_transformer", "deit")


@dataclass(frozen=True)
class EncoderConfig:
    """What it takes to build an encoder and its projection head again; goes into checkpoints."""

    model: str
    """A ViT of timm with a class token, or `vit_synthrep_tiny` (width 128, depth 6, patch 4)."""
    image_size_px: int
    """Side of the square images, a multiple of the patch size."""
    patch_size_px: int | None = None
    """Side of a patch; None keeps that of the model."""
    drop_path_rate: float = 0.0
    """Greatest rate of stochastic depth; StableRep uses none."""
    projection_hidden: int = 4096
    """Width of the two hidden layers of the head."""
    projection_dim: int = 256
    """Dimension of the embeddings."""

    def __post_init__(self) -> None:
        lengths = (self.image_size_px, self.projection_hidden, self.projection_dim)
        if min(*lengths, self.patch_size_px or 1) < 1 or not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"sizes are at least 1, drop_path_rate lies in 0-1, got {self}")

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EncoderConfig":
        """Inverse of `to_json`.

        Raises:
            ValueError: not a JSON object, or one whose fields are not those of this class.
        """
        fields = json.loads(text)
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"expected the fields of an EncoderConfig: {error}") from error


class Tokens(NamedTuple):
    """What an encoder says of images: the class token, and a token for each patch."""

    features: Float[Tensor, "batch features"]
    patches: Float[Tensor, "batch patches features"]


class Encoder(nn.Module):
    """A ViT that gives its class token after the final norm."""

    def __init__(self, backbone: VisionTransformer) -> None:
        """Takes a backbone that has a class token."""
        super().__init__()
        self.backbone: VisionTransformer = backbone

    @property
    def width(self) -> int:
        """Dimension of the features."""
        return int(self.backbone.num_features)

    @property
    def patch_size_px(self) -> int:
        """Side of a patch."""
        return int(self.backbone.patch_embed.patch_size[0])

    @property
    def num_patches(self) -> int:
        """Patches of an image of the configured size."""
        return int(self.backbone.patch_embed.num_patches)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features of normalised images of the configured size."""
        tokens = self.backbone.forward_features(images)  # (B, 1 + patches, width)
        features: Tensor = tokens[:, 0]
        return features

    def tokens(
        self,
        images: Float[Tensor, "batch 3 height width"],
        masks: Bool[Tensor, "batch patches"] | None = None,
        mask_token: Float[Tensor, " features"] | None = None,
    ) -> Tokens:
        """All tokens of normalised images of any size that the patches tile.

        Position embeddings are interpolated for other sizes than the configured one. Where `masks`
        is true, `mask_token` stands in place of the patch.
        """
        backbone = self.backbone
        grid = backbone.patch_embed.proj(images)  # (B, width, rows, columns)
        patches = backbone.patch_embed.norm(grid.flatten(2).transpose(1, 2))
        if masks is not None and mask_token is not None:
            patches = torch.where(masks[..., None], mask_token.to(patches.dtype), patches)
        tokens = self._placed(patches, (grid.shape[2], grid.shape[3]))
        tokens = backbone.norm(backbone.blocks(backbone.norm_pre(tokens)))
        return Tokens(tokens[:, 0], tokens[:, backbone.num_prefix_tokens :])

    def _placed(
        self, patches: Float[Tensor, "batch patches features"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch tokens features"]:
        """Patches behind the class token (and the like), with positions added."""
        backbone = self.backbone
        found = (backbone.cls_token, getattr(backbone, "dist_token", None), backbone.reg_token)
        prefix = [token.expand(len(patches), -1, -1) for token in found if token is not None]
        if backbone.pos_embed is None:
            return torch.cat([*prefix, patches], dim=1)
        positions = resample_abs_pos_embed(
            backbone.pos_embed,
            new_size=list(grid),
            old_size=list(backbone.patch_embed.grid_size),
            num_prefix_tokens=0 if backbone.no_embed_class else backbone.num_prefix_tokens,
        )
        if backbone.no_embed_class:
            return torch.cat([*prefix, patches + positions], dim=1)
        return torch.cat([*prefix, patches], dim=1) + positions


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


def timm_arguments(config: EncoderConfig) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments with which `timm.create_model` builds the backbone.

    Raises:
        ValueError: the model is no ViT of timm.
    """
    name, arguments = _OWN_MODELS.get(config.model, (config.model, {}))
    if not is_model_in_modules(name, _VIT_MODULES):
        own = ", ".join(_OWN_MODELS)
        raise ValueError(f"model must be {own} or a ViT of timm with a class token, got {name!r}")
    arguments = {
        **arguments,
        "num_classes": 0,
        "global_pool": "token",
        "img_size": config.image_size_px,
        "drop_path_rate": config.drop_path_rate,
    }
    if config.patch_size_px is not None:
        arguments["patch_size"] = config.patch_size_px
    return name, arguments


def make_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """A freshly initialised encoder; the same seed gives the same weights.

    Raises:
        ValueError: the model is no ViT of timm or has no class token, or its patches do not tile
            the image.
    """
    name, arguments = timm_arguments(config)
    with _seeded(seed):
        try:
            backbone = timm.create_model(name, **arguments)
        except AssertionError as error:  # how timm reports a ViT that pools its patches
            raise ValueError(f"cannot build {config.model!r}: {error}") from error
    patch_size_px = backbone.patch_embed.patch_size[0]
    if config.image_size_px % patch_size_px:
        raise ValueError(
            f"image_size_px must be a multiple of the patch, {patch_size_px} px, "
            f"got {config.image_size_px}"
        )
    return Encoder(backbone)


def make_projection_head(config: EncoderConfig, width: int, *, seed: int) -> ProjectionHead:
    """A freshly initialised head for features of `width`; the same seed gives the same weights."""
    with _seeded(seed):
        return ProjectionHead(width, hidden=config.projection_hidden, dim=config.projection_dim)


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: biases, norms and whatever else has one dimension do not decay.

    Position embedding and class token do, as published.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A block whose CPU draws follow the seed and leave the global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
