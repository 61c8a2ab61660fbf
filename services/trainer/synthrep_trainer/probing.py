"""The door of the probes: a labelled set and frozen features in, one result out.

    ProbeSession.fitting_batches -> extract -> select -> record the choice -> test_batches -> score

Images pass once, also when several extractors look at them, and only their features are kept. With
a `Memory`, what an earlier probe extracted is not extracted again, and the score of a baseline on
this set by this protocol is computed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import numpy as np
from PIL import Image
from pydantic import ValidationError

from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.probe_data import Metric, ProbeDataError, ProbeDataset, Split
from synthrep_trainer.probe_features import (
    Extractor,
    Images,
    Memory,
    SplitFeatures,
    extract_split,
)
from synthrep_trainer.probe_multi_label import OneVersusRestProtocol
from synthrep_trainer.probe_protocols import (
    AnyLabels,
    Exam,
    Features,
    FittingPart,
    LinearProtocol,
    ProbeProtocol,
)
from synthrep_trainer.probe_scores import ProbeResult, Score
from synthrep_trainer.probe_session import Choices, ProbeSession, validation_mask

PIXELS_PX = 16
PIXELS_IDENTITY = f"pixels/{PIXELS_PX}/1"
IMAGE_PX = 32
JUDGED = "trained"
"""The name under which `store` and a `Memory` see the judged features."""


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
    memory: Memory | None = None,
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
        memory: features and scores of earlier probes.
        clock: seconds, monotonic.

    Raises ProbeDataError where the set is at fault, ValueError where an extractor is, or the
    protocol does not suit the set.
    """
    started = clock()
    session, metric = ProbeSession(dataset), dataset.metric
    protocol = protocol or default_protocol(metric)
    _require_suited(protocol, dataset)
    judged_by = (image_px, protocol.name, protocol.version, protocol.settings, metric, seed)
    known = _known_scores(memory, dataset, baselines, judged_by)
    fresh = {name: extractor for name, extractor in baselines.items() if name not in known}
    extractors = {JUDGED: extract, **fresh}
    parts, names = _fitting_parts(session, extractors, memory, image_px=image_px, seed=seed)
    selections = {name: protocol.select(part, metric) for name, part in parts.items()}
    choices = {name: s.chosen for name, s in selections.items()}
    session.record(choices | {name: row.chosen or 0.0 for name, row in known.items()}, store=store)

    test_batches = session.test_batches(image_px=image_px)
    keys = _keys(memory, extractors, dataset, "test", image_px)
    test = extract_split(test_batches, extractors, keys, memory.cache if memory else None)
    _require_known(test.labels, parts[JUDGED].labels, f"{dataset.name}: test")
    exam = Exam(test.labels, names, metric, seed)
    verdicts = {
        name: protocol.judge(part, choices[name], test.features[name], exam)
        for name, part in parts.items()
    }
    scores = known | {name: verdicts[name].score for name in fresh}
    _remember_scores(memory, dataset, {name: scores[name] for name in fresh}, judged_by)
    majority = protocol.majority(parts[JUDGED].labels, exam)
    judged, selection = verdicts[JUDGED], selections[JUDGED]
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
        baselines={**{name: scores[name] for name in baselines}, "majority": majority},
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


def _known_scores(
    memory: Memory | None,
    dataset: ProbeDataset,
    baselines: Iterable[str],
    judged_by: tuple[object, ...],
) -> dict[str, Score]:
    """The scores of baselines that an earlier probe has computed."""
    known: dict[str, Score] = {}
    for name in baselines if memory is not None else ():
        assert memory is not None
        key = memory.score_key(name, dataset, *judged_by)
        with suppress(ValidationError):  # none is there, or one of another version
            known[name] = Score.model_validate(memory.cache.note(key) if key else None)
    return known


def _remember_scores(
    memory: Memory | None,
    dataset: ProbeDataset,
    scores: Mapping[str, Score],
    judged_by: tuple[object, ...],
) -> None:
    for name, row in scores.items() if memory is not None else ():
        assert memory is not None
        key = memory.score_key(name, dataset, *judged_by)
        if key is not None:
            memory.cache.keep_note(key, row.model_dump(mode="json"))


def _keys(
    memory: Memory | None,
    extractors: Iterable[str],
    dataset: ProbeDataset,
    split: Split,
    image_px: int,
) -> dict[str, str | None]:
    if memory is None:
        return {}
    return {name: memory.features_key(name, dataset, split, image_px) for name in extractors}


def _fitting_parts(
    session: ProbeSession,
    extractors: Mapping[str, Extractor],
    memory: Memory | None,
    *,
    image_px: int,
    seed: int,
) -> tuple[dict[str, FittingPart], tuple[str, ...]]:
    """Train and val of each extractor, and the names of the classes."""
    parts = [
        extract_split(
            session.fitting_batches(split, image_px=image_px),
            extractors,
            _keys(memory, extractors, session.dataset, split, image_px),
            memory.cache if memory else None,
        )
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
    features = {name: _joined([part.features[name] for part in parts]) for name in extractors}
    return {name: FittingPart(rows, labels, is_val) for name, rows in features.items()}, names


def _joined(rows: Sequence[Features]) -> Features:
    """One array; a single one stays mapped."""
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _class_names(session: ProbeSession, parts: Sequence[SplitFeatures]) -> tuple[str, ...]:
    """Names by class index; raises ProbeDataError unless train has each class, and two of them."""
    where = f"{session.dataset.name}: train"
    labels, known = parts[0].labels, session.class_names
    if labels.ndim > 1:
        assert known is not None, "sets of several labels name their classes"
        return known
    if known is None and labels.max() > len(labels):  # counted from 0, or from 1
        raise ProbeDataError(f"{where} has class index {labels.max()} and {len(labels)} images")
    names = known or tuple(str(i) for i in range(int(labels.max()) + 1))
    if len(names) < 2 or (labels == labels[0]).all():
        raise ProbeDataError(f"{where} has one class only, at least two are needed")
    strange = labels[(labels < 0) | (labels >= len(names))]
    if len(strange):
        raise ProbeDataError(
            f"{where} has class index {strange[0]}, the set names {len(names)} classes"
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
