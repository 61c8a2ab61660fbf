"""Which images are good enough to keep: pure checks of pixels, and what models say of them.

Checks look at images in the order in which they are made and know the images that they let pass
before, so the same job refuses the same images wherever it runs. The models that judge are handed
in; they live in `image_judges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from synthrep_generator.synthesis import Pixels
from synthrep_shared.messages import QualityGate

_BLANK_DEVIATION = 3.0  # of 255, in the channel that varies most
_DUPLICATE_BITS = 4  # of 64; slight noise turns up to 2, two images of a caption differ by 14


class SafetyJudge(Protocol):
    """A model that knows unsafe images."""

    def are_unsafe(self, images: Sequence[Pixels]) -> list[bool]:
        """One verdict an image."""
        ...


class CaptionJudge(Protocol):
    """A model that compares images with captions."""

    def scores(self, images: Sequence[Pixels], captions: Sequence[str]) -> list[float]:
        """The cosine, -1 to 1, of each image and the caption in its place."""
        ...


@dataclass(frozen=True)
class Judges:
    """The models at hand."""

    safety: SafetyJudge | None = None
    caption: CaptionJudge | None = None


@dataclass(frozen=True)
class Candidate:
    """An image to be judged, its caption and the batch it belongs to."""

    pixels: Pixels
    caption: str
    batch: str


@dataclass(frozen=True)
class Refusal:
    """The check that an image did not pass, and what to tell."""

    check: str
    reason: str


class Gate:
    """Judges the images of one job; `capacity` is the most that it may let pass.

    Raises ValueError if it asks for a judge that is not at hand.
    """

    def __init__(self, settings: QualityGate, judges: Judges, *, capacity: int) -> None:
        self._settings, self._judges = settings, judges
        if settings.safety and judges.safety is None:
            raise ValueError("the gate wants a safety checker and none is loaded")
        if settings.min_clip_score is not None and judges.caption is None:
            raise ValueError("the gate wants a CLIP model and none is loaded")
        self._album = Album(capacity)

    @property
    def max_attempts(self) -> int:
        """Seeds tried for an image before its prompt fails."""
        return self._settings.max_attempts

    def review(self, candidates: Sequence[Candidate]) -> list[Refusal | None]:
        """One verdict an image, None for those let pass."""
        verdicts: list[Refusal | None] = [None] * len(candidates)
        for check in (self._find_blank, self._find_unsafe, self._find_unlike, self._find_repeated):
            left = [i for i, verdict in enumerate(verdicts) if verdict is None]
            found = check([candidates[i] for i in left]) if left else []
            for i, verdict in zip(left, found, strict=True):
                verdicts[i] = verdict
        return verdicts

    def _find_blank(self, candidates: Sequence[Candidate]) -> list[Refusal | None]:
        if not self._settings.blank:
            return [None] * len(candidates)
        refusal = Refusal("blank", "the image is next to one colour")
        return [refusal if is_blank(c.pixels) else None for c in candidates]

    def _find_unsafe(self, candidates: Sequence[Candidate]) -> list[Refusal | None]:
        if not self._settings.safety or self._judges.safety is None:
            return [None] * len(candidates)
        refusal = Refusal("safety", "the safety checker marks the image")
        verdicts = self._judges.safety.are_unsafe([c.pixels for c in candidates])
        return [refusal if is_unsafe else None for is_unsafe in verdicts]

    def _find_unlike(self, candidates: Sequence[Candidate]) -> list[Refusal | None]:
        least = self._settings.min_clip_score
        if least is None or self._judges.caption is None:
            return [None] * len(candidates)
        scores = self._judges.caption.scores(
            [c.pixels for c in candidates], [c.caption for c in candidates]
        )
        return [
            Refusal("caption", f"CLIP score {score:.3f} is below {least:g}")
            if not score >= least
            else None
            for score in scores
        ]

    def _find_repeated(self, candidates: Sequence[Candidate]) -> list[Refusal | None]:
        """The last check, since it remembers what passes it."""
        if not self._settings.duplicates:
            return [None] * len(candidates)
        refusal = Refusal("duplicate", "the image looks like another one of the batch")
        return [None if self._album.add(c.pixels, c.batch) else refusal for c in candidates]


class Album:
    """Remembers the looks of up to `capacity` images, by batch: a batch does not see another's."""

    def __init__(self, capacity: int) -> None:
        self._hashes = np.zeros(capacity, np.uint64)
        self._owners = np.zeros(capacity, np.int64)
        self._batches: dict[str, int] = {}
        self._count = 0

    def add(self, pixels: Pixels, batch: str) -> bool:
        """Take the image in, unless one of its batch that looks like it is there."""
        looks, owner = perceptual_hash(pixels), self._batches.setdefault(batch, len(self._batches))
        hashes, owners = self._hashes[: self._count], self._owners[: self._count]
        distances = np.bitwise_count(hashes ^ looks)
        if bool(((distances <= _DUPLICATE_BITS) & (owners == owner)).any()):
            return False
        self._hashes[self._count], self._owners[self._count] = looks, owner
        self._count += 1
        return True


def is_blank(pixels: Pixels) -> bool:
    """Whether no channel varies by more than a faint noise."""
    return bool(pixels.std(axis=(0, 1)).max() < _BLANK_DEVIATION)


def perceptual_hash(pixels: Pixels) -> np.uint64:
    """64 bits of an image's coarse shapes in grey; images that look alike differ in a few."""
    from imagehash import phash  # only where a batch asks for it: it brings scipy

    bits = phash(Image.fromarray(pixels)).hash
    return np.uint64(np.packbits(bits.ravel()).view(np.uint64)[0])
