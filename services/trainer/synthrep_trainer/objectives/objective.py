"""What all objectives have in common: the towers' inputs and outputs, and the interface.

    batch -> Inputs -> towers -> Features -> objective (heads, loss) -> Outcome

Towers (encoder, text tower) have no batch statistics and may see a batch in pieces; heads and loss
must see it whole. An objective is an `nn.Module` that owns its heads, and a pure function of
features, caption ids and targets otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from synthrep_trainer.augment import normalise
from synthrep_trainer.encoder import Encoder
from synthrep_trainer.teacher_losses import Assignments
from synthrep_trainer.text_tower import TextTower


class Inputs(NamedTuple):
    """A batch as the towers see it; the rows of a caption are adjacent in each tensor."""

    images: UInt8[Tensor, "batch height width 3"]
    tokens: Int64[Tensor, "captions context"] | None = None
    crops: UInt8[Tensor, "crops crop_height crop_width 3"] | None = None
    masks: Bool[Tensor, "batch patches"] | None = None
    """True where the encoder sees a mask token in place of a patch."""

    def split(self, captions: int, captions_per_piece: int) -> Iterator[Inputs]:
        """The rows of a few captions at a time, of all `captions` in the end."""
        for start in range(0, captions, captions_per_piece):
            stop = min(start + captions_per_piece, captions)
            yield Inputs._make(
                None if rows is None else rows[_cut(rows, captions, start, stop)] for rows in self
            )


def _cut(rows: Tensor, captions: int, start: int, stop: int) -> slice:
    per_caption = len(rows) // captions
    return slice(start * per_caption, stop * per_caption)


class Features(NamedTuple):
    """What the towers make of Inputs, row by row; None for what was not there."""

    images: Float[Tensor, "batch features"]
    texts: Float[Tensor, "captions text_features"] | None = None
    crops: Float[Tensor, "crops features"] | None = None
    patches: Float[Tensor, "masked features"] | None = None
    """The tokens of the masked patches."""


class Targets(NamedTuple):
    """What a teacher says of a batch, without gradient."""

    embeddings: Float[Tensor, "batch dim"]
    assignments: Assignments
    """Of the masked patches."""


class Outcome(NamedTuple):
    """The loss, of all ranks, and what it was computed from."""

    loss: Float[Tensor, ""]
    embeddings: Float[Tensor, "batch dim"]
    """Of this rank's images, as the loss saw them."""
    terms: Mapping[str, Tensor]
    """What the loss is the sum of, where it is one, and other numbers worth a curve."""


class Towers(nn.Module):
    """Encoder, and text tower and mask token where an objective has them."""

    def __init__(
        self, encoder: Encoder, text: TextTower | None = None, *, has_mask_token: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text
        self.mask_token: nn.Parameter | None = None
        if has_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(encoder.width))

    def forward(self, inputs: Inputs) -> Features:
        """Features of uint8 pixels and of tokens."""
        images = normalise(inputs.images)
        patches = None
        if inputs.masks is None:
            rows = self.encoder(images)
        else:
            tokens = self.encoder.tokens(images, inputs.masks, self.mask_token)
            rows, patches = tokens.features, tokens.patches[inputs.masks]
        crops = None
        if inputs.crops is not None:
            crops = self.encoder.tokens(normalise(inputs.crops)).features
        texts = None
        if self.text is not None and inputs.tokens is not None:
            texts = self.text(inputs.tokens)
        # Not as views of all tokens: FSDP2 hangs its hooks on what comes out.
        crops = None if crops is None else crops.clone()
        return Features(rows.clone(), texts, crops, patches)


class TeacherTower(nn.Module):
    """An encoder that sees whole images and says what the masked patches are; no gradient."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> Features:
        """Features of uint8 pixels."""
        tokens = self.encoder.tokens(normalise(inputs.images))
        patches = None if inputs.masks is None else tokens.patches[inputs.masks]
        return Features(tokens.features, patches=patches)


class Objective(nn.Module):
    """Heads and loss of one way to learn."""

    def make_towers(self, encoder: Encoder, *, seed: int) -> Towers:
        """The towers that the features come from."""
        return Towers(encoder)

    def complete(self, inputs: Inputs, *, seed: int) -> Inputs:
        """Adds what the objective draws itself, such as masks; on the CPU, from the seed."""
        return inputs

    @property
    def teacher_heads(self) -> nn.Module | None:
        """The heads whose moving average teaches, None for an objective without a teacher."""
        return None

    def targets(self, heads: nn.Module, features: Features, *, step: int) -> Targets:
        """What the averaged heads say of the averaged encoder's features; without gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no teacher")

    @abstractmethod
    def forward(
        self,
        features: Features,
        caption_ids: Int64[Tensor, " batch"],
        targets: Targets | None = None,
    ) -> Outcome:
        """The loss of this rank's rows among those of all ranks."""

    def after_update(self) -> None:
        """Brings parameters back to where they may be; called after each optimizer step."""


def in_fp32(tensor: Tensor) -> AbstractContextManager[None]:
    """A block without autocast, for losses."""
    return torch.autocast(tensor.device.type, enabled=False)
