"""StableRep and SimCLR: every image is drawn to the images that share its id, away from the rest.

One objective for both: for SimCLR an id is that of an image, for StableRep that of a caption.
"""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor

from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.heads import make_projection_head
from synthrep_trainer.losses import multi_positive_contrastive_loss
from synthrep_trainer.objectives.objective import (
    Features,
    Objective,
    Outcome,
    Targets,
    in_fp32,
)


class MultiPositive(Objective):
    """The published head and the multi-positive loss."""

    def __init__(
        self,
        encoder: EncoderConfig,
        width: int,
        *,
        temperature: float,
        rows_per_caption: int,
        seed: int,
    ) -> None:
        """`rows_per_caption` adjacent rows are views that the head normalises one by one."""
        super().__init__()
        self.projection = make_projection_head(encoder, width, seed=seed)
        self.temperature, self.rows_per_caption = temperature, rows_per_caption

    def forward(
        self,
        features: Features,
        caption_ids: Int64[Tensor, " batch"],
        targets: Targets | None = None,
    ) -> Outcome:
        """See Objective."""
        embeddings = self.projection(features.images, self.rows_per_caption)
        with in_fp32(embeddings):
            loss = multi_positive_contrastive_loss(embeddings, caption_ids, self.temperature)
        return Outcome(loss, embeddings, {})
