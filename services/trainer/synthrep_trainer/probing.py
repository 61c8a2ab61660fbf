"""The door of the probes: a labelled set and frozen features in, one result out.

    ProbeSession.fitting_batches -> extract -> select -> record the choice -> test_batches -> score

An `Extractor` maps uint8 images (batch, px, px, 3), RGB, to features (batch, dim) of any float
dtype; batching on a device is its own affair. Images pass once, also when several extractors look
at them, and only their features are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.probe_archive import ImageBatch
from synthrep_trainer.probe_data import Metric, ProbeDataError, ProbeDataset
from synthrep_trainer.probe_multi_label import OneVersusRestProtocol
from synthrep_trainer.probe_protocols import (
    AnyLabels,
    Exam,
    Features,
    FittingPart,
    LinearProtocol,
    ProbeProtocol,
)
from synthrep_trainer.probe_scores import ProbeResult
from synthrep_trainer.probe_session import Choices, ProbeSession, validation_mask

PIXELS_PX = 16
IMAGE_PX = 32
_JUDGED = "trained"  # the name under which `store` sees the choice for the judged features

Images = UInt8[np.ndarray, "batch px px 3"]
Extractor = Callable[[Images], np.ndarray]


def raw_pixels(images: Images) -> Features:
    """The baseline that any representation must beat: RGB at 16 x 16, as fractions."""
    small = [
        Image.fromarray(image).resize((PIXELS_PX, PIXELS_PX), Image.Resampling.BICUBIC)
        for image in images
    ]
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])


BASELINES: Mapping[str, Extractor] = MappingProxyType({"pixels": raw_pixels})


def probe(
    dataset: ProbeDataset,
    extract: Extractor,
    *,
    image_px: int = IMAGE_PX,
    protocol: ProbeProtocol | None = None,
    baselines: Mapping[str, Extractor] = BASELINES,
    seed: int = 0,
    store: Callable[[Choices], None] | None = None,
    keep_head: Callable[[LinearHead, tuple[str, ...]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ProbeResult:
    """Judge features on a labelled set.

    Args:
        dataset: from `probe_datasets`.
        extract: the features to judge.
        image_px: side of the images that the extractors are given.
        protocol: the linear one that suits the set, unless given.
        baselines: other features to judge on the same images, by name; for one,
            `{**BASELINES, "random_init": …}`. `majority` is always added.
        seed: of the validation rows, where the set has none of its own, and of the bootstrap.
        store: called with the choices before the test part is opened, to make them durable.
        keep_head: given the fitted classifier of `extract` and the names of the classes, where the
            protocol makes one.
        clock: seconds, monotonic.

    Raises ProbeDataError where the set is at fault, ValueError where an extractor is, or the
    protocol does not suit the set.
    """
    started = clock()
    session, metric = ProbeSession(dataset), dataset.metric
    protocol = protocol or default_protocol(metric)
    _require_suited(protocol, dataset)
    extractors = {_JUDGED: extract, **baselines}
    parts, names = _fitting_parts(session, extractors, image_px=image_px, seed=seed)
    selections = {name: protocol.select(part, metric) for name, part in parts.items()}
    session.record({name: s.chosen for name, s in selections.items()}, store=store)

    test = _extract(session.test_batches(image_px=image_px), extractors)
    _require_known(test.labels, parts[_JUDGED].labels, f"{dataset.name}: test")
    exam = Exam(test.labels, names, metric, seed)
    verdicts = {
        name: protocol.judge(part, selections[name].chosen, test.features[name], exam)
        for name, part in parts.items()
    }
    majority = protocol.majority(parts[_JUDGED].labels, exam)
    judged, selection = verdicts[_JUDGED], selections[_JUDGED]
    if keep_head is not None and judged.head is not None:
        keep_head(judged.head, names)
    return ProbeResult(
        dataset=dataset.name,
        protocol=protocol.name,
        protocol_version=protocol.version,
        metric=metric,
        value=judged.score.value,
        ci95=judged.score.ci95,
        n_test=len(test.labels),
        chosen=selection.chosen,
        settings=protocol.settings,
        curve=selection.curve,
        per_class=judged.per_class,
        confusion=judged.confusion,
        hits=judged.score.hits,
        baselines={**{name: verdicts[name].score for name in baselines}, "majority": majority},
        seconds=clock() - started,
    )


def default_protocol(metric: Metric, *, device: str = "cpu") -> ProbeProtocol:
    """The linear probe for a set that is scored so."""
    if metric == "map_11point":
        return OneVersusRestProtocol(device=device)
    return LinearProtocol(device=device)


def _require_suited(protocol: ProbeProtocol, dataset: ProbeDataset) -> None:
    if protocol.is_multi_label != (dataset.metric == "map_11point"):
        several = "several labels" if dataset.metric == "map_11point" else "one label"
        raise ValueError(
            f"{dataset.name} has {several} an image, for which the protocol "
            f"{type(protocol).__name__} is not made"
        )


@dataclass(frozen=True)
class _Part:
    """One split after extraction."""

    features: dict[str, Features]
    labels: AnyLabels


def _extract(batches: Iterable[ImageBatch], extractors: Mapping[str, Extractor]) -> _Part:
    features: dict[str, list[Features]] = {name: [] for name in extractors}
    labels: list[AnyLabels] = []
    for batch in batches:
        labels.append(batch.labels)
        for name, extract in extractors.items():
            features[name].append(_checked(extract(batch.images), len(batch.labels), name))
    return _Part({n: np.concatenate(rows) for n, rows in features.items()}, np.concatenate(labels))


def _checked(features: Any, num_images: int, name: str) -> Features:
    rows = np.asarray(features, np.float32)
    if rows.ndim != 2 or len(rows) != num_images:
        raise ValueError(f"{name}: expected features ({num_images}, dim), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: the features are not finite")
    return rows


def _fitting_parts(
    session: ProbeSession, extractors: Mapping[str, Extractor], *, image_px: int, seed: int
) -> tuple[dict[str, FittingPart], tuple[str, ...]]:
    """Train and val of each extractor, and the names of the classes."""
    parts = [
        _extract(session.fitting_batches(split, image_px=image_px), extractors)
        for split in session.fitting_splits
    ]
    names = _class_names(session, parts)
    labels = np.concatenate([part.labels for part in parts])
    if len(parts) > 1:
        is_val = np.arange(len(labels)) >= len(parts[0].labels)
    else:
        is_val = validation_mask(labels, seed=seed)
    if not is_val.any():
        raise ProbeDataError(f"{session.dataset.name}: train has one image a class, none validates")
    features = {
        name: np.concatenate([part.features[name] for part in parts]) for name in extractors
    }
    return {name: FittingPart(rows, labels, is_val) for name, rows in features.items()}, names


def _class_names(session: ProbeSession, parts: Sequence[_Part]) -> tuple[str, ...]:
    """Names by class index; raises ProbeDataError unless train has each class, and two of them."""
    where = f"{session.dataset.name}: train"
    labels, known = parts[0].labels, session.class_names
    if labels.ndim > 1:
        assert known is not None, "sets of several labels name their classes"
        return known
    names = known or tuple(str(i) for i in range(int(labels.max()) + 1))
    if len(names) < 2 or (labels == labels[0]).all():
        raise ProbeDataError(f"{where} has one class only, at least two are needed")
    if labels.max() >= len(names):
        raise ProbeDataError(
            f"{where} has class index {labels.max()}, classes.txt names {len(names)} classes"
        )
    if known is not None:
        absent = sorted(set(range(len(names))) - set(labels.tolist()))
        if absent:
            raise ProbeDataError(f"{where} has no image of class {absent[0]}, {names[absent[0]]!r}")
    for part in parts[1:]:
        _require_known(part.labels, labels, f"{session.dataset.name}: val")
    return names


def _require_known(labels: AnyLabels, train: AnyLabels, where: str) -> None:
    unknown = np.setdiff1d(labels, train)
    if len(unknown):
        raise ProbeDataError(f"{where} has class index {unknown[0]}, which train has not")
