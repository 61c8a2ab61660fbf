"""Which row is best on a set, and whether that can be said: pure functions of hits.

A row's hits are a bool array (seeds, test images); a set's images are the same, in the same order,
for every row and seed. The test is a paired bootstrap over seeds and test images: both are drawn
anew with replacement, the same draw for both rows, and what is looked at is the difference. It
takes three seeds at least: two that agree by chance would do otherwise. Where seeds differ more
than test images account for, an interval of few seeds is too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
MIN_SEEDS = 3
MIN_TEST_IMAGES = 1000
PIXELS = "pixels"
Hits = NDArray[np.bool_]  # (seeds, test images)
Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """What one set says of its rows."""

    best: str
    second: str | None
    difference: Estimate | None
    """Best less second-best, over the seeds that both have; None without a second."""
    is_significant: bool
    """Whether that interval excludes 0, with three seeds or more."""
    is_counted: bool
    why_not: str = ""
    """Why the set is not counted."""


def unpack_hits(packed: str, num_images: int) -> Hits:
    """The bits of a probe's `hits` (num_images,); raises ValueError if they are of other length."""
    data = bytes.fromhex(packed)
    if len(data) != -(-num_images // 8):
        raise ValueError(f"{len(data)} bytes of hits cannot be {num_images} images")
    return np.unpackbits(np.frombuffer(data, np.uint8))[:num_images].astype(bool)


def draw_weights(
    num_seeds: int, class_sizes: Sequence[int], *, by_class: bool, seed: int, resamples: int
) -> tuple[Weights, Weights]:
    """Weights of the seeds (resamples, seeds) and images (resamples, images); rows sum to 1.

    With `by_class` every class weighs the same and is drawn within itself, as its mean wants.
    """
    dice = np.random.default_rng(seed)
    seeds = dice.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), resamples) / num_seeds
    sizes = [size for size in class_sizes if size]
    parts = sizes if by_class else [sum(sizes)]
    images = [dice.multinomial(n, np.full(n, 1 / n), resamples) / (n * len(parts)) for n in parts]
    return seeds, np.concatenate(images, axis=1)


def estimate(
    values: NDArray[np.float64],
    class_sizes: Sequence[int],
    *,
    by_class: bool,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Mean of values (seeds, images) and its percentile interval over both.

    With one seed the interval is over test images alone.
    """
    sizes = np.array([size for size in class_sizes if size])
    plain = np.full(values.shape[1], 1 / values.shape[1])
    if by_class:
        plain = np.repeat(1 / (sizes * len(sizes)), sizes)
    of_seeds, of_images = draw_weights(
        len(values), class_sizes, by_class=by_class, seed=seed, resamples=resamples
    )
    means = ((of_seeds @ values) * of_images).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float((values @ plain).mean()), (float(low), float(high)))


def judge(
    hits: Mapping[str, Mapping[int, Hits]],
    class_sizes: Sequence[int],
    *,
    by_class: bool,
    candidates: Sequence[str],
) -> tuple[dict[str, Estimate], Verdict | None]:
    """Each row's mean, and which of the candidates is best; None without a candidate.

    Args:
        hits: by row, then by seed, one set's hits (images,), in the order of classes.
        class_sizes: test images of each class, in that order.
        by_class: whether the metric is the mean over classes.
        candidates: the rows that may be best; the others are baselines.
    """
    stacked = {row: np.stack(list(seeds.values())).astype(float) for row, seeds in hits.items()}
    means = {row: estimate(v, class_sizes, by_class=by_class) for row, v in stacked.items()}
    ranked = sorted((r for r in means if r in candidates), key=lambda r: -means[r].mean)
    if not ranked:
        return means, None
    best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    difference, is_significant = None, False
    common = sorted(set(hits[best]) & set(hits[second])) if second else []
    if second and common:
        apart = [hits[best][s].astype(float) - hits[second][s] for s in common]
        difference = estimate(np.stack(apart), class_sizes, by_class=by_class)
        is_significant = len(common) >= MIN_SEEDS and difference.ci95[0] > 0
    why_not = _why_not_counted(means, means[best], sum(class_sizes))
    return means, Verdict(best, second, difference, is_significant, not why_not, why_not)


def _why_not_counted(means: Mapping[str, Estimate], best: Estimate, num_images: int) -> str:
    if num_images < MIN_TEST_IMAGES:
        return f"{num_images} test images, fewer than {MIN_TEST_IMAGES}"
    if PIXELS in means and best.mean <= means[PIXELS].mean:
        return "no trained row beats raw pixels"
    return ""
