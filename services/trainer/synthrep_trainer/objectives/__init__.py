"""Objectives: what a batch is to teach, with the heads and the views that it takes.

stablerep   images of one caption are positives
simclr      two crops of one image are
clip        an image and its caption are
stablerep+  stablerep and clip
synclr      stablerep against an averaged teacher, with small crops and masked modelling
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from synthrep_trainer.encoder import Encoder, EncoderConfig
from synthrep_trainer.objectives.contrastive import MultiPositive
from synthrep_trainer.objectives.language import ImageText, MultiPositiveWithText
from synthrep_trainer.objectives.objective import (
    Features,
    Inputs,
    Objective,
    Outcome,
    Targets,
    TeacherTower,
    Towers,
)
from synthrep_trainer.objectives.synclr import SynCLR, SynclrConfig
from synthrep_trainer.text_tower import TextConfig

__all__ = [
    "Features",
    "Inputs",
    "Objective",
    "ObjectiveConfig",
    "Outcome",
    "SynclrConfig",
    "Targets",
    "TeacherTower",
    "TextConfig",
    "Towers",
    "make_objective",
]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objective, and its sizes and weights."""

    name: Literal["stablerep", "stablerep+", "simclr", "clip", "synclr"]
    rows_per_caption: int
    """Adjacent rows of a batch that belong to one caption."""
    temperature: float = 0.1
    """Of the multi-positive loss; CLIP learns its own."""
    text: TextConfig = field(default_factory=TextConfig)
    text_dim: int = 128
    """Dimension of the space that images and texts share; 512 in CLIP."""
    image_weight: float = 1.0
    """Weight of the multi-positive loss in stablerep+."""
    text_weight: float = 1.0
    """Weight of the image-text loss in stablerep+."""
    synclr: SynclrConfig = field(default_factory=SynclrConfig)


def make_objective(
    config: ObjectiveConfig, encoder_config: EncoderConfig, encoder: Encoder, *, seed: int
) -> Objective:
    """Fresh heads for the features of `encoder`; the same seed gives the same weights."""
    rows, width = config.rows_per_caption, encoder.width
    if config.name == "clip":
        return ImageText(width, config.text, dim=config.text_dim, rows_per_caption=rows, seed=seed)
    if config.name == "stablerep+":
        return MultiPositiveWithText(
            encoder_config,
            width,
            config.text,
            dim=config.text_dim,
            temperature=config.temperature,
            image_weight=config.image_weight,
            text_weight=config.text_weight,
            rows_per_caption=rows,
            seed=seed,
        )
    if config.name == "synclr":
        return SynCLR(
            config.synclr,
            encoder,
            temperature=config.temperature,
            rows_per_caption=rows,
            seed=seed,
        )
    return MultiPositive(
        encoder_config,
        width,
        temperature=config.temperature,
        rows_per_caption=rows,
        seed=seed,
    )
