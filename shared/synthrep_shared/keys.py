"""Bearer keys: who a caller is, what the key may do, and how much of it.

A key is kept as its sha256 alone from the moment it was read. Two live keys of one name are one
owner, so that a key can be replaced without a gap and without losing sight of earlier work.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

KeyScope = Literal["submit", "read", "probe", "admin"]
ALL_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
ANONYMOUS = "anonymous"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Principal:
    """The caller of one request, as its key says.

    `datasets` holds names and prefixes (`pets`, `birds-*`); None leaves the caller to its own.
    """

    owner: str
    scopes: frozenset[str]
    datasets: tuple[str, ...] | None = None
    max_outstanding_prompts: int | None = None
    max_prompts_per_day: int | None = None

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do everything, with everyone's work."""
        return "admin" in self.scopes

    @property
    def sees_all(self) -> bool:
        """Whether the caller may see figures over everyone's work."""
        return self.is_admin or "*" in (self.datasets or ())

    def has(self, scope: KeyScope) -> bool:
        """Whether the caller may use routes of this scope."""
        return self.is_admin or scope in self.scopes

    def owns(self, owner: str) -> bool:
        """Whether what belongs to `owner` is the caller's to see and to change."""
        return self.is_admin or owner == self.owner

    def lists(self, dataset: str) -> bool:
        """Whether the caller's key names the data set."""
        return any(
            dataset.startswith(name[:-1]) if name.endswith("*") else dataset == name
            for name in self.datasets or ()
        )


OPEN = Principal(ANONYMOUS, frozenset(ALL_SCOPES))
"""The caller of a service without keys."""


class ApiKey(BaseModel):
    """One accepted bearer key; a plain string stands for a key of all scopes without a name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern="^[a-z0-9][a-z0-9_-]{0,63}$")
    """Owner of what the key makes, in files. Two keys may share it; not needed with `key`."""
    key_sha256: SecretStr
    """Hex sha256 of the key, which then needs a name; or give the key itself as `key`."""
    scopes: tuple[KeyScope, ...] = Field(default=ALL_SCOPES, min_length=1)
    """`read` sees, `submit` hands in and stops, `probe` starts probes, `admin` does all for all."""
    max_outstanding_prompts: int | None = Field(default=None, ge=1)
    """Most accepted and unfinished prompts of the owner."""
    max_prompts_per_day: int | None = Field(default=None, ge=1)
    """Most prompts of the owner in any 24 h."""
    datasets: tuple[str, ...] | None = None
    """Data sets that the key reaches, whoever made them: names, prefixes `birds-*`, or `*`."""

    @model_validator(mode="before")
    @classmethod
    def _forget_the_key(cls, values: Any) -> Any:
        if isinstance(values, SecretStr | str):
            values = {"key": values}
        if not isinstance(values, dict):
            return values
        values = dict(values)
        key = values.pop("key", None)
        if (key is None) == ("key_sha256" not in values):
            raise ValueError("give either key or key_sha256 of an API key")
        if key is not None:
            key = key.get_secret_value() if isinstance(key, SecretStr) else key
            if not isinstance(key, str) or not key:
                raise ValueError("an API key is a string that is not empty")
            values["key_sha256"] = hashlib.sha256(key.encode()).hexdigest()
            values.setdefault("name", _owner_of_unnamed(key))
        return values

    @model_validator(mode="after")
    def _is_a_digest_that_opens_what_it_says(self) -> ApiKey:
        if not _DIGEST.fullmatch(self.key_sha256.get_secret_value()):
            raise ValueError("key_sha256 is 64 hexadecimal digits, lower case")
        if self.datasets is not None and "admin" in self.scopes:
            raise ValueError("a key of the scope admin reaches all data sets; give other scopes")
        return self

    @property
    def principal(self) -> Principal:
        """Who comes with this key."""
        return Principal(
            owner=self.name,
            scopes=frozenset(self.scopes),
            datasets=self.datasets,
            max_outstanding_prompts=self.max_outstanding_prompts,
            max_prompts_per_day=self.max_prompts_per_day,
        )


class KeyRing:
    """The accepted keys; finds who sent a header."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._known = [
            (bytes.fromhex(key.key_sha256.get_secret_value()), key.principal) for key in keys
        ]

    def find(self, authorization: bytes) -> Principal | None:
        """The caller that the value of an `Authorization` header stands for; None if no key is."""
        if not self._known:
            return OPEN
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found: Principal | None = None
        # Every key is compared, so that the time tells nothing about which one matched.
        for known, principal in self._known:
            if hmac.compare_digest(digest, known):
                found = principal
        return found if scheme.lower() == b"bearer" else None


def _owner_of_unnamed(key: str) -> str:
    """What stands for a key in files; tells nothing of it."""
    return hashlib.sha256(b"synthrep-owner:" + key.encode()).hexdigest()[:16]
