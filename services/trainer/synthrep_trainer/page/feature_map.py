"""The map of a run's features as a drawing: a mark an image, a shape and a colour a caption.

Colours tell a few captions apart at best, and not to everyone: each caption has a shape too, each
mark a title, and a list beside the drawing names what is on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from synthrep_trainer.feature_maps import FeatureMap, MappedGroup
from synthrep_trainer.page.rendering import render

SHAPES = 6
"""In the template, by number."""
_WIDTH, _HEIGHT, _MARGIN = 160.0, 100.0, 3.0
_GOLDEN_ANGLE_DEGREES = 137.508  # consecutive hues are far apart, however many there are


@dataclass(frozen=True)
class Cluster:
    """The marks of one group, and the caption whose image is nearest to one of its own."""

    group: MappedGroup
    shape: int
    hue: int
    places: tuple[tuple[float, float], ...]
    nearest: str


@lru_cache(maxsize=16)
def drawing(feature_map: FeatureMap) -> str:
    """The map as HTML; drawn once, as pages ask for it every second."""
    return render(
        "feature_map.html",
        map=feature_map,
        clusters=list(clusters(feature_map)),
        shapes=SHAPES,
        width=_WIDTH,
        height=_HEIGHT,
    )


def clusters(feature_map: FeatureMap) -> Iterator[Cluster]:
    """The groups in their order; equal captions look alike."""
    looks: dict[str, int] = {}
    places: list[list[tuple[float, float]]] = [[] for _ in feature_map.groups]
    for image, place in zip(feature_map.images, _places(feature_map), strict=True):
        places[image.group].append(place)
    for group, marks in zip(feature_map.groups, places, strict=True):
        look = looks.setdefault(group.caption, len(looks))
        near = feature_map.neighbours(group.gid, 1)
        yield Cluster(
            group=group,
            shape=look % SHAPES,
            hue=round(look * _GOLDEN_ANGLE_DEGREES) % 360,
            places=tuple(marks),
            nearest=near[0].group.caption if near else "",
        )


def _places(feature_map: FeatureMap) -> Iterator[tuple[float, float]]:
    """Of each image in the drawing, y downwards; both axes have one scale."""
    xs, ys = [image.x for image in feature_map.images], [image.y for image in feature_map.images]
    spans = max(xs) - min(xs), max(ys) - min(ys)
    room = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    scale = min((r / s for r, s in zip(room, spans, strict=True) if s > 0), default=1.0)
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    for x, y in zip(xs, ys, strict=True):
        yield (
            round(_WIDTH / 2 + scale * (x - middle[0]), 2),
            round(_HEIGHT / 2 - scale * (y - middle[1]), 2),
        )
