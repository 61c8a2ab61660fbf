"""Captions that a program can read off a labelled 32 px photo.

A caption names the class and up to three attributes measured on the pixels: the dominant colour of
the subject (centre), the colour of the background (border ring), and whether the subject fills the
frame. Everything here is a pure function of the pixels, so captions can be recomputed and checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLOURS = ("black", "white", "grey", "red", "brown", "yellow", "green", "blue")
_BORDER_PX = 3
_CLOSE_UP_FRACTION = 0.62  # of all pixels that differ from the background
_DISTINCT = 0.16  # RGB distance (0-1 scale) at which a pixel counts as subject


def colour_names(rgb: np.ndarray) -> np.ndarray:
    """Index into `COLOURS` of each colour in `rgb` (..., 3), floats in 0-1."""
    top, low = rgb.max(-1), rgb.min(-1)
    chroma = top - low
    safe = np.where(chroma > 0, chroma, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        top == r, ((g - b) / safe) % 6, np.where(top == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    hue = 60.0 * sector
    saturation = np.where(top > 0, chroma / np.where(top > 0, top, 1.0), 0.0)
    names = np.full(top.shape, COLOURS.index("blue"))
    names[hue < 170] = COLOURS.index("green")
    names[hue < 60] = COLOURS.index("yellow")
    warm = (hue < 46) | (hue >= 330)
    names[warm] = COLOURS.index("brown")
    names[warm & ((hue < 15) | (hue >= 330)) & (saturation > 0.45) & (top > 0.35)] = COLOURS.index(
        "red"
    )
    names[(hue >= 36) & (hue < 60) & (saturation < 0.45)] = COLOURS.index("brown")
    plain = (saturation < 0.14) | (chroma < 0.07)
    names[plain] = COLOURS.index("grey")
    names[plain & (top > 0.78)] = COLOURS.index("white")
    names[top < 0.2] = COLOURS.index("black")
    return names


def _dominant(names: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Per image, the colour name with the largest summed weight; both arrays are (N, pixels)."""
    votes = np.stack([(weights * (names == c)).sum(1) for c in range(len(COLOURS))], axis=1)
    return votes.argmax(1)


def attributes(images: np.ndarray) -> np.ndarray:
    """Subject colour, background colour, close-up 0/1 (N, 3) of uint8 images (N, H, W, 3)."""
    rgb = images.astype(np.float32) / 255.0
    count, height, width, _ = rgb.shape
    names = colour_names(rgb).reshape(count, -1)
    ring = np.ones((height, width), bool)
    ring[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    border_pixels = rgb[:, ring]
    background = _dominant(names[:, ring.ravel()], np.ones((count, int(ring.sum())), np.float32))
    middle = np.median(border_pixels, axis=1)
    distance = np.linalg.norm(rgb - middle[:, None, None, :], axis=-1)
    distinct = (distance > _DISTINCT).reshape(count, -1)
    rows, columns = np.mgrid[0:height, 0:width]
    radius = (rows - (height - 1) / 2) ** 2 / (height / 4) ** 2 + (
        columns - (width - 1) / 2
    ) ** 2 / (width / 4) ** 2
    centre = np.exp(-0.5 * radius).ravel().astype(np.float32)
    weights = centre[None] * np.where(distinct, 1.0, 0.02)
    subject = _dominant(names, weights)
    close_up = distinct.mean(1) > _CLOSE_UP_FRACTION
    return np.stack([subject, background, close_up.astype(int)], axis=1)


def caption(
    class_name: str,
    subject: int | None = None,
    background: int | None = None,
    close_up: bool = False,
) -> str:
    """The sentence for a class and its attributes; attributes that are None are left out."""
    noun = class_name if subject is None else f"{COLOURS[subject]} {class_name}"
    article = "an" if noun[0] in "aeiou" else "a"
    sentence = f"a close-up of {article} {noun}" if close_up else f"{article} {noun}"
    if background is None:
        return sentence
    return f"{sentence}, {COLOURS[background]} background"


def captions(class_names: Sequence[str], labels: np.ndarray, measured: np.ndarray) -> list[str]:
    """The full caption of each image from its label (N,) and measured attributes (N, 3)."""
    return [
        caption(class_names[label], subject, background, bool(close))
        for label, (subject, background, close) in zip(labels, measured, strict=True)
    ]
