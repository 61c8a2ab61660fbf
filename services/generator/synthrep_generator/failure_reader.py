"""Why prompts failed: the files that failure records of the commit log name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from synthrep_generator.failure_writer import Failure
from synthrep_generator.intake import IntakeReader
from synthrep_generator.progress import DatasetIndex
from synthrep_shared.commit_log import CommitRecord, GroupRef
from synthrep_shared.messages import FailureView
from synthrep_shared.storage import Location

logger = logging.getLogger(__name__)
_FAILURES = TypeAdapter(list[Failure])


def failure_views(
    index: DatasetIndex, batch_id: str, *, skip: int, limit: int
) -> list[FailureView]:
    """Up to `limit` failures of the batch after the first `skip`, in the log's order."""
    shown: list[FailureView] = []
    for record, refs in index.failures(batch_id, skip):
        shown += views_of_record(index, record, refs[: limit - len(shown)])
        if len(shown) == limit:
            break
    return shown


def views_of_record(
    index: DatasetIndex, record: CommitRecord, refs: Sequence[GroupRef]
) -> list[FailureView]:
    """The failures of one record. A prompt is a failure even where its detail cannot be read."""
    failures = _read_failures(index.paths.failures / record.name)
    return [_view(index, ref, failures.get((ref.batch, ref.index))) for ref in refs]


def _read_failures(path: Location) -> dict[tuple[str, int], Failure]:
    try:
        failures = _FAILURES.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        logger.exception("failure file cannot be read", extra={"file": path.name})
        return {}
    return {(failure.batch, failure.index): failure for failure in failures}


def _view(index: DatasetIndex, ref: GroupRef, failure: Failure | None) -> FailureView:
    if failure is not None:
        return FailureView.model_validate(failure, from_attributes=True)
    prompts = IntakeReader(index.paths, ref.batch).prompts(ref.index, 1)
    reason = "the recorded reason cannot be read"
    return FailureView(index=ref.index, prompt="".join(prompts), reason=reason, attempts=0)
