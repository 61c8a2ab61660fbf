"""CLIP and StableRep+: images are drawn to the text they were made from.

    clip        (image-to-text + text-to-image) / 2, one text a caption
    stablerep+  w1 * multi-positive loss + w2 * the same

In the text-to-image direction all images of a caption are positives of its text, with equal
weight. The logit scale is learned; its logarithm begins at ln(1 / 0.07) and is brought back into
[0, 4.6052] after each step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from synthrep_trainer.encoder import Encoder, EncoderConfig
from synthrep_trainer.heads import make_projection_head
from synthrep_trainer.losses import clip_loss, multi_positive_contrastive_loss
from synthrep_trainer.objectives.objective import (
    Features,
    Objective,
    Outcome,
    Targets,
    Towers,
    in_fp32,
)
from synthrep_trainer.randomness import seeded
from synthrep_trainer.text_tower import TextConfig, make_text_tower

_FIRST_LOG_SCALE = math.log(1 / 0.07)
_LARGEST_LOG_SCALE = 4.6052  # a scale of 100


class ImageText(Objective):
    """CLIP: a linear map for each tower, a learned scale, both directions."""

    def __init__(
        self, width: int, text: TextConfig, *, dim: int, rows_per_caption: int, seed: int
    ) -> None:
        """Maps features of images (`width`) and of texts to embeddings of `dim`."""
        super().__init__()
        self.text_config, self.rows_per_caption = text, rows_per_caption
        self.image_projection = nn.Linear(width, dim, bias=False)
        self.text_projection = nn.Linear(text.width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))
        with seeded(seed):
            nn.init.normal_(self.image_projection.weight, std=width**-0.5)
            nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)

    def make_towers(self, encoder: Encoder, *, seed: int) -> Towers:
        """See Objective."""
        return Towers(encoder, make_text_tower(self.text_config, seed=seed))

    def forward(
        self,
        features: Features,
        caption_ids: Int64[Tensor, " batch"],
        targets: Targets | None = None,
    ) -> Outcome:
        """See Objective."""
        images = self.image_projection(features.images)
        loss = self._image_text(images, features.texts, caption_ids)
        return Outcome(loss, images, {"logit_scale": self.log_scale.detach().exp()})

    def _image_text(self, images: Tensor, texts: Tensor | None, caption_ids: Tensor) -> Tensor:
        assert texts is not None, "the views were asked for with captions"
        texts = self.text_projection(texts)
        with in_fp32(images):
            return clip_loss(
                images,
                texts,
                image_caption_ids=caption_ids,
                text_caption_ids=caption_ids[:: self.rows_per_caption],
                logit_scale=self.log_scale.exp(),
            )

    @torch.no_grad()
    def after_update(self) -> None:
        """Clamps the scale."""
        self.log_scale.clamp_(0.0, _LARGEST_LOG_SCALE)


class MultiPositiveWithText(ImageText):
    """StableRep+: the head and loss of StableRep beside those of CLIP."""

    def __init__(
        self,
        encoder: EncoderConfig,
        width: int,
        text: TextConfig,
        *,
        dim: int,
        temperature: float,
        image_weight: float,
        text_weight: float,
        rows_per_caption: int,
        seed: int,
    ) -> None:
        """The weights are w1 and w2 of the module."""
        super().__init__(width, text, dim=dim, rows_per_caption=rows_per_caption, seed=seed + 1)
        self.projection = make_projection_head(encoder, width, seed=seed)
        self.temperature = temperature
        self.image_weight, self.text_weight = image_weight, text_weight

    def forward(
        self,
        features: Features,
        caption_ids: Int64[Tensor, " batch"],
        targets: Targets | None = None,
    ) -> Outcome:
        """See Objective."""
        embeddings = self.projection(features.images, self.rows_per_caption)
        with in_fp32(embeddings):
            image_loss = multi_positive_contrastive_loss(embeddings, caption_ids, self.temperature)
        text_loss = self._image_text(
            self.image_projection(features.images), features.texts, caption_ids
        )
        loss = self.image_weight * image_loss + self.text_weight * text_loss
        terms = {
            "image_loss": image_loss.detach(),
            "text_loss": text_loss.detach(),
            "logit_scale": self.log_scale.detach().exp(),
        }
        return Outcome(loss, embeddings, terms)
