"""The root of every exception tree.

SynthRepError
├── StorageError          a path or file under the shard root cannot be used
│   └── ShardContentError     a shard is not what its record in the log says
├── CommitLogError        the commit log is malformed or of an unknown version
├── AlreadyDecidedError   a group already has an outcome in the log
└── ServiceError          a service answered with problem details (client side)
    └── ServiceUnavailableError   no answer, or 503 after all retries
"""

from __future__ import annotations

from collections.abc import Sequence


class SynthRepError(Exception):
    """Base of every error that SynthRep raises on purpose."""


class StorageError(SynthRepError):
    """A path or file under the shard root cannot be used."""


class ShardContentError(StorageError):
    """A shard is not what its record in the commit log says."""


class CommitLogError(SynthRepError):
    """The commit log is malformed or of an unknown version."""


class AlreadyDecidedError(SynthRepError):
    """Some groups of a record already have an outcome; `gids` lists them."""

    def __init__(self, gids: Sequence[str]) -> None:
        super().__init__(f"{len(gids)} groups already have an outcome, first {gids[0]}")
        self.gids = frozenset(gids)


class ServiceError(SynthRepError):
    """A service answered with problem details (RFC 9457)."""

    def __init__(self, status: int, title: str, detail: str = "") -> None:
        super().__init__(f"{status} {title}: {detail}" if detail else f"{status} {title}")
        self.status, self.title, self.detail = status, title, detail


class ServiceUnavailableError(ServiceError):
    """No answer, or asked to come back later more often than the client retries."""
