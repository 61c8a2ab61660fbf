"""From a checkpoint and its run's data set to the map of the run's features.

    newest shards -> sample of groups -> images, whole -> features -> two axes, nearest images

A probe draws it, once for each checkpoint, when it has judged the checkpoint: the encoder is there
already. What the sample is follows from the log alone, so the same log, checkpoint and bound give
the same map. It is taken from the newest shards only, because each is verified whole.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from synthrep_shared.commit_log import CommitRecord, GroupRef, LogReader
from synthrep_shared.errors import StorageError
from synthrep_shared.shard_copies import ShardCopies
from synthrep_trainer.admissions import AdmissionJournal
from synthrep_trainer.augment import AugmentConfig, augment
from synthrep_trainer.batches import UNDECODABLE, decode
from synthrep_trainer.checkpoint_folders import CheckpointFolder
from synthrep_trainer.feature_maps import (
    FeatureMap,
    MappedGroup,
    MappedImage,
    read_feature_map,
    write_feature_map,
)
from synthrep_trainer.order import is_held_out
from synthrep_trainer.representation import (
    nearest_of_other_captions,
    neighbour_accuracy,
    principal_plane,
)
from synthrep_trainer.runs import RunFolder
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.shard_files import (
    GroupKey,
    read_caption,
    read_images,
    verify_shard,
)
from synthrep_trainer.sources import open_dataset

_log = logging.getLogger(__name__)
_MAX_SHARDS = 16
_RECORDS_BACK = 200  # a rejection stands behind what it takes back
_READ_BYTES = 1 << 20
_IMAGES_PER_GROUP = 4
_NEIGHBOURS = 8
_IMAGES_PER_PASS = 64
_DIGITS = 4  # of places and cosines
_UNREADABLE: tuple[type[Exception], ...] = (StorageError, *UNDECODABLE)

Extractor = Callable[[UInt8[np.ndarray, "batch px px 3"]], Float32[np.ndarray, "batch dim"]]


class Choice(NamedTuple):
    """A group of the sample: where it stands in the record of its shard."""

    place: int
    group: GroupRef
    is_held_out: bool


class Shown(NamedTuple):
    """A group of the sample with its pixels, (images, px, px, 3)."""

    group: MappedGroup
    caption_id: int
    pixels: UInt8[np.ndarray, "images px px 3"]


def draw_feature_map(
    run: RunFolder,
    checkpoint: CheckpointFolder,
    extract: Extractor,
    *,
    image_px: int,
    settings: TrainerSettings,
) -> FeatureMap | None:
    """Write the map of a checkpoint; None if the run has this one or a later one, or no images.

    Raises OSError, RunError and CommitLogError where the data set's log cannot be read.
    """
    known = read_feature_map(run.path)
    if known is not None and (
        known.step > checkpoint.step or known.checkpoint == checkpoint.sha256
    ):
        return None
    record, shown = run.record, list[Shown]()
    # A generator that does not answer at once is not waited for: the next probe draws the map.
    place = open_dataset(
        record.request, run.path, settings, is_writer=False, should_stop=lambda: True
    )
    with place as (dataset, reader):
        # A store has an object a record: only those about where the run reads are fetched.
        seen = AdmissionJournal(run.path / "admissions.jsonl", is_writer=False).last_seq
        reader.seek(max(0, seen - _RECORDS_BACK))
        copies = ShardCopies(dataset, max_bytes=settings.copy_bytes)
        chosen = choose(reader, held_out=record.held_out, max_images=settings.map_images)
        for shard, choices in chosen:
            shown += _read(copies, shard, choices, AugmentConfig.whole(image_px))
    if not shown:
        return None
    features = _features(shown, extract)
    drawn = _drawn(shown, features, record.request.dataset_name, checkpoint)
    write_feature_map(run.path, drawn)
    _log.info("feature_map_drawn", extra={"run": run.id, "step": drawn.step})
    return drawn


def choose(
    reader: LogReader, *, held_out: float, max_images: int
) -> list[tuple[CommitRecord, list[Choice]]]:
    """Groups of the newest shards, the newest first; captions held out take up to half the room.

    `held_out` is the share of captions that a run is not trained on.
    """
    shards: deque[CommitRecord] = deque(maxlen=_MAX_SHARDS)
    rejected: set[str] = set()
    while records := reader.poll(_READ_BYTES):
        for record in records:
            if record.kind == "shard":
                shards.append(record)
            elif record.kind == "reject":
                rejected.update(group.gid for group in record.groups)
    found: list[tuple[CommitRecord, Choice]] = []
    for record in reversed(shards):
        ids = np.array([int(group.caption_id, 16) for group in record.groups], dtype=np.int64)
        is_out = is_held_out(ids, held_out)
        found += [
            (record, Choice(place, group, bool(is_out[place])))
            for place, group in reversed(list(enumerate(record.groups)))
            if group.gid not in rejected
        ]
    outside = _first([item for item in found if item[1].is_held_out], max_images // 2)
    room = max_images - sum(map(_num_images, outside))
    inside = _first([item for item in found if not item[1].is_held_out], room)
    chosen: dict[int, tuple[CommitRecord, list[Choice]]] = {}
    for record, choice in [*outside, *inside]:
        chosen.setdefault(record.seq, (record, []))[1].append(choice)
    return list(chosen.values())


def _num_images(item: tuple[CommitRecord, Choice]) -> int:
    return min(item[1].group.images, _IMAGES_PER_GROUP)


def _first(
    items: Sequence[tuple[CommitRecord, Choice]], max_images: int
) -> list[tuple[CommitRecord, Choice]]:
    """The first items that have no more images in all."""
    totals = np.cumsum([_num_images(item) for item in items], dtype=np.int64)
    return list(items[: int(np.searchsorted(totals, max_images, side="right"))])


def _read(
    copies: ShardCopies, shard: CommitRecord, choices: Sequence[Choice], view: AugmentConfig
) -> Iterator[Shown]:
    """The chosen groups of a shard; one that is not what the log says is left out, and logged.

    To put it in quarantine is for the run, which will meet it.
    """
    keys = [GroupKey(g.gid, g.caption_id, g.images) for g in shard.groups]
    try:
        path = copies.path(shard.name, sha256=shard.sha256, num_bytes=shard.bytes)
        layout = verify_shard(path, sha256=shard.sha256, num_bytes=shard.bytes, groups=keys)
        for place, group, is_out in choices:
            images = read_images(path, layout, place, range(min(group.images, _IMAGES_PER_GROUP)))
            pixels = np.stack([augment(decode(image), view, seed=0) for image in images])
            caption = read_caption(path, layout, place)
            mapped = MappedGroup(gid=group.gid, caption=caption, is_held_out=is_out)
            yield Shown(mapped, int(group.caption_id, 16), pixels)
    except _UNREADABLE as error:
        _log.warning("shard_left_off_map", extra={"shard": shard.name, "reason": str(error)})


def _features(shown: Sequence[Shown], extract: Extractor) -> Float32[np.ndarray, "images dim"]:
    pixels = np.concatenate([group.pixels for group in shown])
    passes = range(0, len(pixels), _IMAGES_PER_PASS)
    return np.concatenate([extract(pixels[i : i + _IMAGES_PER_PASS]) for i in passes])


def _drawn(
    shown: Sequence[Shown],
    features: Float32[np.ndarray, "images dim"],
    dataset: str,
    checkpoint: CheckpointFolder,
) -> FeatureMap:
    rows = torch.from_numpy(features)
    ids = torch.tensor([group.caption_id for group in shown for _ in group.pixels])
    plane = principal_plane(rows)
    nearest = nearest_of_other_captions(rows, ids, _NEIGHBOURS)
    places = [(g, k) for g, group in enumerate(shown) for k in range(len(group.pixels))]
    images = [
        MappedImage(
            group=group,
            image=image,
            x=round(x, _DIGITS),
            y=round(y, _DIGITS),
            nearest=tuple((other, round(cosine, _DIGITS)) for other, cosine in near),
        )
        for (group, image), (x, y), near in zip(
            places, plane.coordinates.tolist(), nearest, strict=True
        )
    ]
    return FeatureMap(
        dataset=dataset,
        step=checkpoint.step,
        checkpoint=checkpoint.sha256,
        shares=plane.shares,
        neighbour_accuracy=neighbour_accuracy(rows, ids),
        groups=tuple(group.group for group in shown),
        images=tuple(images),
    )
