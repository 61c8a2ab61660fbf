"""The verdict on a campaign: from the data sets' intake, logs and shards, and the receipts."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from synthrep_generator.intake import IntakeReader, list_batches
from synthrep_generator.synthesis import ImageTask, paint
from synthrep_generator.verify import verify_dataset
from synthrep_shared.commit_log import read_log
from synthrep_shared.errors import CommitLogError
from synthrep_shared.samples import SampleMetadata
from synthrep_shared.storage import DatasetPaths
from tests.chaos.load import Receipt

_POISON = "[fake:"
_FOREVER_S = 1e9


@dataclass
class Verdict:
    """Counts of prompts; `bad` counts files, records and images that are not as they should be."""

    lost: int = 0
    duplicated: int = 0
    bad: int = 0
    innocent: int = 0
    accepted: int = 0
    committed: int = 0
    failed: int = 0
    poison: int = 0
    poison_failed: int = 0
    leftovers: int = 0
    images: int = 0
    findings: list[str] = field(default_factory=list)


def judge(root: Path, datasets: Sequence[str], receipts: Sequence[Receipt]) -> Verdict:
    """Compare what was promised with what is there."""
    verdict = Verdict()
    for name in datasets:
        paths = DatasetPaths(root, name)
        if paths.folder.is_dir():
            _judge_dataset(paths, verdict)
        _compare(paths, [r for r in receipts if r.dataset == name], verdict)
    return verdict


def _judge_dataset(paths: DatasetPaths, verdict: Verdict) -> None:
    report = verify_dataset(paths, now_s=time.time(), min_age_s=_FOREVER_S, judge=judge_image)
    verdict.accepted += report.accepted
    verdict.committed += report.committed
    verdict.failed += report.failed
    verdict.lost += report.undecided
    verdict.duplicated += report.duplicated
    verdict.bad += len(report.damage)
    verdict.images += report.images
    verdict.leftovers += len(report.leftovers)
    verdict.findings += [f"{d.kind} {paths.dataset}/{d.file}: {d.detail}" for d in report.damage]
    failed = _failed(paths)
    for batch in list_batches(paths):
        reader = IntakeReader(paths, batch)
        for index, prompt in enumerate(reader.prompts(0, reader.header.num_prompts)):
            is_failed = (batch, index) in failed
            if _POISON in prompt:
                verdict.poison += 1
                verdict.poison_failed += is_failed
            elif is_failed:
                verdict.innocent += 1
                verdict.findings.append(f"innocent {paths.dataset}/{batch} {index}: {prompt}")


def _failed(paths: DatasetPaths) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    try:
        for record in read_log(paths.log):
            if record.kind == "failure":
                found |= {(ref.batch, ref.index) for ref in record.groups}
    except CommitLogError:
        pass  # counted as damage already
    return found


def _compare(paths: DatasetPaths, receipts: Sequence[Receipt], verdict: Verdict) -> None:
    """What was answered 202 is in the intake, and nothing else is: requests were repeated."""
    promised = {receipt.batch: receipt.num_prompts for receipt in receipts}
    present = set(list_batches(paths))
    for batch in promised.keys() - present:
        verdict.accepted += promised[batch]
        verdict.lost += promised[batch]
        verdict.findings.append(f"lost {paths.dataset}/{batch}: it was answered 202")
    for batch in present - promised.keys():
        verdict.duplicated += IntakeReader(paths, batch).header.num_prompts
        verdict.findings.append(f"duplicated {paths.dataset}/{batch}: nobody was answered with it")


def judge_image(metadata: SampleMetadata, data: bytes) -> str | None:
    """The fake's images are a function of caption and seed: is this the one?"""
    task = ImageTask(metadata.caption, metadata.seed)
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)))
    except UnidentifiedImageError:
        return "no image"
    return None if np.array_equal(pixels, paint(task, metadata.stored_px)) else "another image"
