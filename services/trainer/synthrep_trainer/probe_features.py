"""Features of a split: each image decoded once for all who look at it, or not at all if cached.

An `Extractor` maps uint8 images (batch, px, px, 3), RGB, to features (batch, dim) of any float
dtype; batching on a device is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from synthrep_trainer.feature_cache import FeatureCache, cache_key
from synthrep_trainer.probe_archive import ImageBatch
from synthrep_trainer.probe_data import ProbeDataset, Split
from synthrep_trainer.probe_protocols import AnyLabels, Features
from synthrep_trainer.probe_splits import fingerprint

TRANSFORM = "bicubic-short-side-centre-crop/1"

Images = UInt8[np.ndarray, "batch px px 3"]
Extractor = Callable[[Images], np.ndarray]


@dataclass(frozen=True)
class SplitFeatures:
    """One split as each extractor sees it."""

    features: dict[str, Features]
    labels: AnyLabels


@dataclass(frozen=True)
class Memory:
    """What earlier probes have left to this one.

    `identities` says by the name of an extractor what its features depend on, beside the images:
    for an encoder, the sha256 of its checkpoint. One without an identity is not remembered.
    """

    cache: FeatureCache
    identities: Mapping[str, str] = field(default_factory=dict)

    def features_key(
        self, name: str, dataset: ProbeDataset, split: Split, image_px: int
    ) -> str | None:
        """The key of an extractor's features, None if it has no identity."""
        if name not in self.identities:
            return None
        transform = f"{TRANSFORM}/{image_px}"
        return cache_key(self.identities[name], fingerprint(dataset, split), transform)

    def score_key(self, name: str, dataset: ProbeDataset, *judged_by: object) -> str | None:
        """The key of a score that also depends on `judged_by`, None without an identity."""
        if name not in self.identities:
            return None
        prints = [fingerprint(dataset, split) for split in dataset.splits]
        return cache_key(self.identities[name], prints, TRANSFORM, *judged_by)


def extract_split(
    batches: Iterable[ImageBatch],
    extractors: Mapping[str, Extractor],
    keys: Mapping[str, str | None],
    cache: FeatureCache | None,
) -> SplitFeatures:
    """The features of each extractor; those with a key come from the cache or go there.

    `batches` is not touched if the cache has them all. Raises ValueError where an extractor is at
    fault.
    """
    found: dict[str, Features] = {}
    labels: AnyLabels | None = None
    if cache is not None:
        for name in extractors:
            key = keys.get(name)
            cached = cache.features(key) if key is not None else None
            if cached is not None:
                found[name], labels = cached
    missing = {name: extract for name, extract in extractors.items() if name not in found}
    if missing or labels is None:
        fresh = _extract(batches, missing, keys, cache)
        found, labels = found | fresh.features, fresh.labels
    return SplitFeatures({name: found[name] for name in extractors}, labels)


def _extract(
    batches: Iterable[ImageBatch],
    extractors: Mapping[str, Extractor],
    keys: Mapping[str, str | None],
    cache: FeatureCache | None,
) -> SplitFeatures:
    held: dict[str, list[Features]] = {name: [] for name in extractors}
    labels: list[AnyLabels] = []
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(cache.writer(key))
            for name in extractors
            if cache is not None and (key := keys.get(name)) is not None
        }
        for batch in batches:
            labels.append(batch.labels)
            for name, extract in extractors.items():
                rows = _checked(extract(batch.images), len(batch.labels), name)
                if name in writers:
                    writers[name].add(rows, batch.labels)
                else:
                    held[name].append(rows)
    features = {
        name: writers[name].result[0] if name in writers else np.concatenate(rows)
        for name, rows in held.items()
    }
    return SplitFeatures(features, np.concatenate(labels))


def _checked(features: Any, num_images: int, name: str) -> Features:
    rows = np.asarray(features, np.float32)
    if rows.ndim != 2 or len(rows) != num_images:
        raise ValueError(f"{name}: expected features ({num_images}, dim), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: the features are not finite")
    return rows
