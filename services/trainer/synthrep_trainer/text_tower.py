"""The text tower of CLIP: a causal transformer over caption tokens, read at the END token.

Pre-norm layers, learned positions, initialised as CLIP is. The linear map to the space that images
share is a head of the objective, not part of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from synthrep_trainer.randomness import seeded
from synthrep_trainer.text_tokens import END, VOCABULARY

_TOKEN_STD, _POSITION_STD = 0.02, 0.01  # of CLIP
_MLP_RATIO = 4


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text tower; CLIP has width 512, 12 layers, 8 heads."""

    width: int = 128
    """Dimension of the tokens and of the features."""
    layers: int = 2
    heads: int = 4
    """Attention heads a layer; they divide the width."""
    context: int = 128
    """Tokens a caption, START and END included: two more than the bytes that are read."""

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.context < 3:
            raise ValueError(f"sizes are at least 1, the context at least 3, got {self}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")


class TextTower(nn.Module):
    """Tokens to features; see the module."""

    def __init__(self, config: TextConfig) -> None:
        """Draws the initial weights from torch's generator."""
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=_TOKEN_STD)
        nn.init.normal_(self.positions, std=_POSITION_STD)

    def forward(
        self, tokens: Int64[Tensor, "captions context"]
    ) -> Float[Tensor, "captions features"]:
        """Features of captions, each with one END; what stands behind it has no influence."""
        rows = self.tokens(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1], device=rows.device, dtype=rows.dtype
        )
        for layer in self.layers:
            rows = layer(rows, src_mask=mask, is_causal=True)
        ends = (tokens == END).int().argmax(dim=1)
        features: Tensor = self.norm(rows[torch.arange(len(rows), device=rows.device), ends])
        return features


def _layer(config: TextConfig) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, _MLP_RATIO * config.width,
        dropout=0.0, activation="gelu", batch_first=True, norm_first=True,
    )  # fmt: skip
    output_std = (2 * config.width * config.layers) ** -0.5
    nn.init.normal_(layer.self_attn.in_proj_weight, std=config.width**-0.5)
    nn.init.normal_(layer.self_attn.out_proj.weight, std=output_std)
    nn.init.normal_(layer.linear1.weight, std=(2 * config.width) ** -0.5)
    nn.init.normal_(layer.linear2.weight, std=output_std)
    return layer


def make_text_tower(config: TextConfig, *, seed: int) -> TextTower:
    """A freshly initialised tower; the same seed gives the same weights."""
    with seeded(seed):
        return TextTower(config)
