"""Captions as bytes: the vocabulary of the text tower, which needs no file and knows no language.

A token is a byte of the caption's UTF-8 form, in lower case, between START and END; PAD fills up.
CLIP's 49,408 byte pairs are four to five times shorter a caption, but they are a vocabulary that
has to travel, fits English web text, and outweighs a small tower: 259 rows of embedding do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from synthrep_shared.samples import normalise_caption

START, END, PAD = 256, 257, 258
VOCABULARY = 259


def encode_captions(captions: Sequence[str], context: int) -> Int64[Tensor, "captions context"]:
    """Tokens of the captions, each START, bytes, END, PAD...; what goes beyond `context` is cut.

    Args:
        context: tokens a caption, at least 2. A cut caption ends in END too, and may end within a
            character.
    """
    tokens = torch.full((len(captions), context), PAD)
    for row, caption in zip(tokens, captions, strict=True):
        data = normalise_caption(caption).lower().encode()[: context - 2]
        ids = torch.tensor([START, *data, END])
        row[: len(ids)] = ids
    return tokens
