"""Judges a data set by its intake files and its commit log, and the shards by what those say.

Nothing else is believed: Redis is not asked, and a folder is only listed to find what does not
belong there. The data set may grow meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from synthrep_generator.dataset_files import DatasetFiles
from synthrep_generator.errors import IntakeError
from synthrep_generator.failure_writer import Failure
from synthrep_generator.intake import BatchHeader, IntakeReader, list_batches
from synthrep_generator.janitor import (
    check_no_record_is_lost,
    digest_in_name,
    find_leftovers,
    list_stored,
)
from synthrep_shared.commit_log import CommitRecord, GroupRef, LogReader, Outcomes
from synthrep_shared.errors import CommitLogError, StorageError
from synthrep_shared.samples import (
    SampleMetadata,
    caption_id,
    image_seed,
    member_name,
    parse_member_name,
)
from synthrep_shared.storage import DatasetPaths, Location, StoredFile, sha256_file

_FAILURES = TypeAdapter(list[Failure])
_BLOCK_PROMPTS = 4096
_ASKED = ("model", "guidance_scale", "num_inference_steps", "scheduler", "negative_prompt")

Member = tuple[str, bytes]  # name, content

Judge = Callable[[SampleMetadata, bytes], str | None]
"""What is wrong with an encoded image of such a description, if anything."""


class Damage(BaseModel):
    """Something that is not as the log or the intake says."""

    kind: Literal["missing", "corrupt", "wrong", "torn", "log", "intake"]
    file: str
    detail: str


class DatasetReport(BaseModel):
    """What was found. An accepted prompt is committed, failed, cancelled or undecided."""

    dataset: str
    accepted: int = 0
    committed: int = 0
    failed: int = 0
    cancelled: int = 0
    undecided: int = 0
    duplicated: int = 0
    """Outcomes beyond the first of a prompt."""
    records: int = 0
    shards: int = 0
    images: int = 0
    bytes: int = 0
    damage: list[Damage] = []
    leftovers: list[str] = []
    """Orphans and old temporary files, relative to the data set's folder; a repair removes them."""
    torn_bytes: int = 0
    """Length of a last line of the log that its writer did not live to end."""

    @property
    def is_sound(self) -> bool:
        """Whether all that was committed is there as it was made, and nothing twice."""
        return not self.damage and not self.duplicated

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to repair either. Undecided prompts are work still to do."""
        return self.is_sound and not self.leftovers and not self.torn_bytes


def verify_dataset(
    paths: DatasetPaths, *, now_s: float, min_age_s: float, judge: Judge | None = None
) -> DatasetReport:
    """Read everything; what may be in the making is left over if it is older than `min_age_s`.

    Raises StorageError if there is no such data set.
    """
    if not paths.folder.is_dir():
        raise StorageError(f"no data set {paths.dataset!r} under {paths.root}")
    audit = _Audit(paths, judge)
    files = list_stored(paths)  # before the log: a file in it that is being committed is no orphan
    before_s = now_s - min_age_s
    audit.read_log(files, torn_before_s=before_s)
    audit.read_intake()
    leftovers = find_leftovers(files, audit.names, audit.log, written_before_s=before_s)
    audit.look_for_leftovers(leftovers)
    return audit.report


@dataclass(frozen=True)
class _Group:
    """A group of a record beside what was accepted."""

    ref: GroupRef
    header: BatchHeader
    prompt: str


class _Audit:
    """Fills in a report, step by step."""

    def __init__(self, paths: DatasetPaths, judge: Judge | None) -> None:
        self._paths, self._judge = paths, judge
        self._files = DatasetFiles(paths)
        self._outcomes = Outcomes()
        self.log = LogReader(paths.log)
        self.names: set[str] = set()
        self.report = DatasetReport(dataset=paths.dataset)

    def read_log(self, files: Sequence[StoredFile], *, torn_before_s: float) -> None:
        """Check every record, up to the first that cannot be read or that only `files` tell of."""
        try:
            while records := self.log.poll():
                for record in records:
                    self._take(record)
            check_no_record_is_lost(files, self.log)
        except CommitLogError as error:
            self._note("log", self._paths.log, str(error))
        else:
            if self.log.torn_bytes and self._paths.log.stat().st_mtime < torn_before_s:
                self.report.torn_bytes = self.log.torn_bytes

    def read_intake(self) -> None:
        """Count what was accepted, and what became of it."""
        for batch in list_batches(self._paths):
            try:
                reader = IntakeReader(self._paths, batch)
                wanted = reader.header.num_prompts
                starts = range(0, wanted + 1, _BLOCK_PROMPTS)  # one more than there should be
                found = sum(len(reader.prompts(start, _BLOCK_PROMPTS)) for start in starts)
            except (IntakeError, ValueError, KeyError) as error:
                self._note("intake", self._paths.intake / f"{batch}.jsonl", str(error))
                continue
            if found != wanted:
                detail = f"{found} prompts, its header says {wanted}"
                self._note("intake", self._paths.intake / f"{batch}.jsonl", detail)
            self._count(batch, wanted)

    def look_for_leftovers(self, leftovers: Sequence[Location]) -> None:
        """Report leftovers; one whose name promises other content shows that publishing tears."""
        for file in sorted(leftovers, key=str):
            self.report.leftovers.append(self._paths.relative_name(file))
            promised = digest_in_name(file)
            with suppress(FileNotFoundError):
                if promised and not sha256_file(file).startswith(promised):
                    self._note("torn", file, "not what its name promises, and of no record")

    def _note(self, kind: str, file: Location, detail: str) -> None:
        entry = {"kind": kind, "file": self._paths.relative_name(file), "detail": detail}
        self.report.damage.append(Damage.model_validate(entry))

    def _count(self, batch: str, num_prompts: int) -> None:
        committed, failed = self._outcomes.committed(batch), self._outcomes.failed(batch)
        rest = num_prompts - committed - failed
        self.report.accepted += num_prompts
        self.report.committed += committed
        self.report.failed += failed
        if batch in self._outcomes.cancelled:
            self.report.cancelled += rest
        else:
            self.report.undecided += rest

    def _take(self, record: CommitRecord) -> None:
        self.report.records += 1
        if record.kind == "shard":
            self.names.add(record.name)
            self.report.shards += 1
            self.report.images += sum(ref.images for ref in record.groups)
            self.report.bytes += record.bytes
            self._check(self._paths.shards / record.name, record, self._check_samples)
        elif record.kind == "failure":
            self.names.add(record.name)
            self._check(self._paths.failures / record.name, record, self._check_failures)
        self._outcomes.apply(self._without_repeats(record))

    def _without_repeats(self, record: CommitRecord) -> CommitRecord:
        """The record with the groups that had no outcome; counts the others."""
        if record.kind not in ("shard", "failure"):
            return record
        first: dict[tuple[str, int], GroupRef] = {}
        for ref in record.groups:
            if not self._outcomes.is_decided(ref.batch, ref.index):
                first.setdefault((ref.batch, ref.index), ref)
        self.report.duplicated += len(record.groups) - len(first)
        return record.model_copy(update={"groups": tuple(first.values())})

    def _check(
        self,
        file: Location,
        record: CommitRecord,
        check: Callable[[Location, bytes, list[_Group]], None],
    ) -> None:
        groups = self._groups(record)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            self._note("missing", file, f"record {record.seq} names it")
            return
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            detail = f"{len(data)} bytes that are not the {record.bytes} of record {record.seq}"
            self._note("corrupt", file, detail)
        elif groups is not None:
            check(file, data, groups)

    def _groups(self, record: CommitRecord) -> list[_Group] | None:
        """The groups of a record as they were accepted; None where one was not."""
        groups = []
        for ref in record.groups:
            where = f"record {record.seq}, batch {ref.batch}, prompt {ref.index}"
            try:
                reader = self._files.reader(ref.batch)
                (prompt,) = reader.prompts(ref.index, 1)
            except (OSError, IntakeError, ValueError, KeyError):
                self._note("log", self._paths.log, f"{where}: never accepted")
                return None
            header = reader.header
            images = header.settings.images_per_prompt if record.kind == "shard" else 0
            wanted = (header.gid(ref.index, prompt), caption_id(prompt), images)
            if (ref.gid, ref.caption_id, ref.images) != wanted:
                self._note("log", self._paths.log, f"{where}: not the group that was asked for")
                return None
            groups.append(_Group(ref, header, prompt))
        return groups

    def _check_failures(self, file: Location, data: bytes, groups: list[_Group]) -> None:
        try:
            found = [(f.gid, f.batch, f.index, f.prompt) for f in _FAILURES.validate_json(data)]
        except ValidationError:
            self._note("wrong", file, "not a list of failures")
            return
        if found != [(g.ref.gid, g.ref.batch, g.ref.index, g.prompt) for g in groups]:
            self._note("wrong", file, "other prompts than its record says")

    def _check_samples(self, file: Location, data: bytes, groups: list[_Group]) -> None:
        """Two members an image, image and description, in the order of the groups."""
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                spans = [(info.name, info.offset_data, info.size) for info in tar]
        except tarfile.TarError as error:
            self._note("wrong", file, f"no tar file: {error}")
            return
        members = [(name, data[start : start + size]) for name, start, size in spans]
        wanted = [(group, k) for group in groups for k in range(group.ref.images)]
        if len(members) != 2 * len(wanted):
            self._note("wrong", file, f"{len(members)} members for {len(wanted)} images")
            return
        for place, (group, k) in enumerate(wanted):
            image, description = members[2 * place : 2 * place + 2]
            fault = _sample_fault(group, k, image, description, self._judge)
            if fault is not None:
                self._note("wrong", file, f"image {k} of group {group.ref.gid}: {fault}")


def _sample_fault(
    group: _Group, k: int, image: Member, description: Member, judge: Judge | None
) -> str | None:
    """What is wrong with image `k` of a group, if anything."""
    ref, settings = group.ref, group.header.settings_of(group.ref.index)
    try:
        named = parse_member_name(image[0])
        metadata = SampleMetadata.model_validate_json(description[1])
    except ValueError as error:
        return str(error)
    if named[:2] != (ref.gid, k) or named[2] == "json":
        return f"{image[0]} is in its place"
    if description[0] != member_name(ref.gid, k, "json"):
        return f"{description[0]} stands beside it"
    attempts = settings.quality_gate.max_attempts if settings.quality_gate else 1
    if metadata.attempt >= attempts:
        return f"attempt {metadata.attempt} of at most {attempts}"
    seed = image_seed(
        ref.gid, k, request_seed=settings.seed, index=ref.index, attempt=metadata.attempt
    )
    found = (metadata.caption, metadata.gid, metadata.image_index, metadata.seed)
    if found != (group.prompt, ref.gid, k, seed) or metadata.caption_id != ref.caption_id:
        return "the description is of another image"
    asked = {name: getattr(settings, name) for name in _ASKED}  # None: of images that were imported
    if any(value not in (None, getattr(metadata, name)) for name, value in asked.items()):
        return "it was not made as was asked for"
    return judge(metadata, image[1]) if judge else None
