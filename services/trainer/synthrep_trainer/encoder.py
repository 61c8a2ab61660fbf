"""Vision transformer: images to features. Sole importer of timm.

Features are what a run is for: the class token after the final norm, which probes and exports read.
The encoder has no batch statistics and may see a batch in pieces; see `heads` for what has them.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from synthrep_trainer.randomness import seeded_with

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

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer's blocks, most of the parameters."""
        return list(self.backbone.blocks)

    def compile_blocks(self) -> None:
        """Compile the transformer's blocks in place, once for all of them, at their first use."""
        for block in self.layers:
            block.compile()

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
    with seeded_with(seed):
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


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: biases, norms and whatever else has one dimension do not decay.

    Position embedding and class token do, as published.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
