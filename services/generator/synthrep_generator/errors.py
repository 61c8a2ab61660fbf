"""The generator's exceptions.

SynthRepError
├── UnknownModelError      the alias is not configured
├── ModelFilesMissingError the alias is configured, its files are not here
├── JudgeMissingError      the gate needs a model that is not configured
├── ModelConfigError       what is configured does not fit the model
├── ModelHubError          a model hub does not give what it should
├── IdempotencyConflictError  the key was used with another body
├── IntakeError            an intake file is malformed
├── DatasetDeniedError     the key may not write to the data set
├── HighWaterError         too many prompts are accepted and unfinished
│   └── QuotaError             of one owner's, or too many in a day
├── DiskReserveError       too little disk space is free
├── UploadError            an upload is not what its content type says
│   └── UploadTooLargeError    it unpacks to more lines or bytes than are allowed
├── BacklogUnknownError    Redis does not say what is queued and running
├── QueueServerError       Redis is set up so that it would lose work
├── RetryableJobError      the job may succeed elsewhere or later
│   └── LeaseLostError     another worker may hold the chunk
└── PermanentPromptError   this prompt can never succeed; carries the reason
"""

from __future__ import annotations

from synthrep_shared.errors import SynthRepError


class UnknownModelError(SynthRepError):
    """The alias is not configured."""


class ModelFilesMissingError(SynthRepError):
    """The alias is configured, but its files are not on this machine."""


class JudgeMissingError(SynthRepError):
    """The quality gate of a batch needs a model that is not configured."""


class ModelConfigError(SynthRepError):
    """What is configured does not fit the model."""


class ModelHubError(SynthRepError):
    """A model hub does not give what it should."""


class IdempotencyConflictError(SynthRepError):
    """The idempotency key was used with another body."""


class IntakeError(SynthRepError):
    """An intake file is malformed."""


class BacklogUnknownError(SynthRepError):
    """Redis does not say what is queued and running."""


class QueueServerError(SynthRepError):
    """Redis is set up so that it would lose work."""


class DatasetDeniedError(SynthRepError):
    """The key may not write to the data set."""


class HighWaterError(SynthRepError):
    """Too many prompts are accepted and unfinished.

    There may be room in `retry_after_s`, or once `excess` prompts have an outcome.
    """

    def __init__(
        self, message: str, *, retry_after_s: int | None = None, excess: int | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s, self.excess = retry_after_s, excess


class QuotaError(HighWaterError):
    """Too many prompts of one owner are accepted and unfinished, or were accepted in a day."""


class DiskReserveError(SynthRepError):
    """Too little disk space is free."""


class UploadError(SynthRepError):
    """An upload is not what its content type says."""


class UploadTooLargeError(UploadError):
    """An upload unpacks to more lines or bytes than are allowed."""


class RetryableJobError(SynthRepError):
    """The job may succeed elsewhere or later."""


class LeaseLostError(RetryableJobError):
    """Another worker may hold the chunk by now."""


class PermanentPromptError(SynthRepError):
    """The prompt can never succeed; the message is the recorded reason."""
