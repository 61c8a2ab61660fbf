"""The trainer's exceptions.

SynthRepError
├── RunError               a run cannot start or go on as asked
│   ├── RunBusyError       another process trains this run
│   └── LogChangedError    the commit log is not the one that this run read before
├── IdempotencyConflictError  the key was used with another body
├── BadShardError          a committed shard is not what the log says; it was put in quarantine
├── NoCheckpointError      there is no checkpoint whose manifest verifies
├── FormError              a form of the page cannot be read
├── ExportError            an encoder cannot be handed on as asked
├── PublishedFileError     a file of others holds no encoder that we know, or cannot be read safely
└── TrainingStoppedError   going on would waste the run
    ├── NonFiniteLossError the loss or its gradient is infinite or not a number
    └── CollapseError      all images have the same embedding
"""

from __future__ import annotations

from synthrep_shared.errors import SynthRepError


class RunError(SynthRepError):
    """A run cannot start or go on as asked."""


class RunBusyError(RunError):
    """Another process trains this run."""


class LogChangedError(RunError):
    """The commit log is not the one that this run read before."""


class IdempotencyConflictError(SynthRepError):
    """The idempotency key was used with another body."""


class BadShardError(SynthRepError):
    """A committed shard is not what the log says; `seq` is its position in the log."""

    def __init__(self, seq: int, reason: str) -> None:
        super().__init__(f"shard {seq}: {reason}")
        self.seq, self.reason = seq, reason


class NoCheckpointError(SynthRepError):
    """There is no checkpoint whose manifest verifies."""


class FormError(SynthRepError):
    """A form of the page cannot be read."""


class ExportError(SynthRepError):
    """An encoder cannot be handed on as asked."""


class PublishedFileError(SynthRepError):
    """A file of others holds no encoder that we know, or cannot be read safely."""


class TrainingStoppedError(SynthRepError):
    """Going on would waste the run."""


class NonFiniteLossError(TrainingStoppedError):
    """The loss or its gradient is infinite or not a number."""


class CollapseError(TrainingStoppedError):
    """All images have the same embedding, where the gradient is zero for ever."""
