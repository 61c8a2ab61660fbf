"""`Idempotency-Key` of a request: which id it was given, in one small file for each key.

The claim is durable before the thing that it names, so that a repetition after a crash in between
makes the same thing and not a second one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from synthrep_shared.storage import publish_bytes
from synthrep_trainer.errors import IdempotencyConflictError


class Claim(BaseModel):
    """What a key stands for: an id, and the request by its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    request_sha256: str


class Claims:
    """The claims of one kind of thing, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make_folder(self) -> None:
        """Create the folder where it is absent."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def find(self, owner: str, key: str, request: BaseModel) -> str | None:
        """The id that the owner's key was given, None for a new key.

        Raises IdempotencyConflictError if it was given to another request.
        """
        try:
            claim = Claim.model_validate_json(self._path(owner, key).read_bytes())
        except FileNotFoundError:
            return None
        if claim.request_sha256 != _digest(request):
            raise IdempotencyConflictError("the Idempotency-Key was used with another body")
        return claim.id

    def take(self, owner: str, key: str, request: BaseModel, new_id: str) -> str:
        """Give the key `new_id`, durably, unless it has an id already; its id.

        Raises IdempotencyConflictError as `find` does.
        """
        claim = Claim(id=new_id, request_sha256=_digest(request))
        if publish_bytes(claim.model_dump_json().encode(), self._path(owner, key)):
            return new_id
        return self.find(owner, key, request) or new_id

    def _path(self, owner: str, key: str) -> Path:
        name = hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()
        return self._folder / f"{name}.json"


def _digest(request: BaseModel) -> str:
    return hashlib.sha256(request.model_dump_json(exclude_unset=True).encode()).hexdigest()
