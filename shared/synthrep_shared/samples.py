"""What a sample is: one image of one caption, its names inside a shard, its provenance.

Pure functions of their arguments. A group is the images of one accepted prompt; its id is derived
from what was asked for, so that doing the work again makes the same group.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

DATASET_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
DATASET_RULE = "a data set's name has 1-64 of a-z, 0-9, _ and -, first a letter or digit"
GID_PATTERN = r"^[0-9a-f]{32}$"
_MEMBER = re.compile(r"^([0-9a-f]{32})-([0-9]{1,4})\.(jpg|png|webp|json)$")
_SEED_BYTES = 6  # 48 bits: exact in every JSON reader

Json = Mapping[str, Any]


class SampleMetadata(BaseModel):
    """The JSON beside each image of a shard: enough to make the image again."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    caption: str
    caption_id: str
    gid: str = Field(pattern=GID_PATTERN)
    image_index: int = Field(ge=0)
    seed: int = Field(ge=0)
    model: str
    model_revision: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str
    stored_px: int
    generator_version: str
    dtype: str = ""
    loras: tuple[str, ...] = ()
    caption_truncated: bool = False
    attempt: int = Field(default=0, ge=0)
    """Seeds that a quality gate refused before this one."""
    batch_images: int = Field(default=1, ge=1)
    """Images in the device pass that made this one: pixels depend on it by rounding."""
    image_quality: int | None = Field(default=None, ge=1, le=100)
    """Quality of the stored JPEG or WebP file; None where it was not recorded."""


def normalise_caption(text: str) -> str:
    """The caption in NFC with runs of white space folded to one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def caption_id(caption: str) -> str:
    """Fifteen hex digits that equal captions share wherever they come from; fits an int64."""
    return hashlib.sha256(normalise_caption(caption).encode()).hexdigest()[:15]


def group_id(dataset: str, batch: str, index: int, prompt: str, settings: Json) -> str:
    """Thirty-two hex digits that name the group of one prompt of one batch."""
    what = json.dumps([dataset, batch, index, prompt, settings], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def image_seed(
    gid: str, image_index: int, *, request_seed: int | None, index: int, attempt: int = 0
) -> int:
    """The seed of an image, from the request's seed where there is one, else from gid.

    `attempt` counts the seeds of this image that were refused before.
    """
    source = gid if request_seed is None else f"{request_seed}:{index}"
    source = f"{source}:{image_index}:{attempt}" if attempt else f"{source}:{image_index}"
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES], "big")


def member_name(gid: str, image_index: int, suffix: str) -> str:
    """Name of a tar member, for instance `<gid>-0.jpg`."""
    return f"{gid}-{image_index}.{suffix}"


def parse_member_name(name: str) -> tuple[str, int, str]:
    """(gid, image index, suffix) of a member name; raises ValueError for any other name."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ValueError(f"not a sample's member name: {name[:80]!r}")
    return match[1], int(match[2]), match[3]
