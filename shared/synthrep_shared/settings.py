"""The base of every service's settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from synthrep_shared.keys import ApiKey
from synthrep_shared.shard_copies import COPY_BYTES
from synthrep_shared.storage import Root

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
_CLIENTS = ("SYNTHREP_GENERATOR_URL", "SYNTHREP_TRAINER_URL")  # share the services' prefixes


class ServiceSettings(BaseSettings):
    """Frozen settings from `<PREFIX>NAME` variables; an unknown prefixed name is an error.

    `<PREFIX>NAME_FILE` names a file that holds the value, for secrets.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    root: Root = Path("runs/data")
    """Folder or `s3://bucket/prefix` that holds the datasets; services and workers see the same.
    A store is reached by AWS_ENDPOINT_URL, AWS_REGION and the credentials of AWS_… variables."""
    copy_bytes: int = Field(default=COPY_BYTES, ge=0)
    """Disk space below `TMPDIR` for copies of shards, where the root is on S3."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback needs at least one API key."""
    api_keys: tuple[ApiKey, ...] = ()
    """Accepted bearer keys as a JSON list of keys or objects, at best from a file; none means:
    loopback only, no authentication. Make one with `openssl rand -hex 32`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, a JSON list, under which a service without API keys answers besides localhost and IP
    addresses, say behind a proxy of this machine; with keys it answers under every name."""
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    """Least severity that is logged."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port at which processes that are no API answer Prometheus, without a key, on the host's
    address; those that a launcher starts take the next ones. 0: they do not."""

    @model_validator(mode="before")
    @classmethod
    def _read_files_and_refuse_unknown(cls, values: Any) -> Any:
        prefix = cls.model_config.get("env_prefix", "")
        if not prefix:
            return values
        for variable, path in os.environ.items():
            if not variable.upper().startswith(prefix) or variable in _CLIENTS:
                continue
            name = variable[len(prefix) :].lower().split("__")[0]
            if name.endswith("_file") and name.removesuffix("_file") in cls.model_fields:
                values[name.removesuffix("_file")] = _value(Path(path).read_text().strip())
                values.pop(name, None)
            elif name not in cls.model_fields:
                raise ValueError(
                    f"unknown setting {variable}; known: {', '.join(sorted(cls.model_fields))}"
                )
        return values

    @field_validator("api_keys", mode="before")
    @classmethod
    def _one_key_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("api_keys")
    @classmethod
    def _no_key_twice(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if len({key.key_sha256.get_secret_value() for key in keys}) < len(keys):
            raise ValueError("an API key is given twice")
        return keys

    def metrics_ports(self, first: int = 0, count: int = 1) -> range:
        """The ports `first` to `first + count - 1` after that of the setting, if it has one."""
        start = self.metrics_port + first
        return range(start, start + count if self.metrics_port else start)

    @model_validator(mode="after")
    def _open_only_with_a_key(self) -> ServiceSettings:
        if self.host not in LOOPBACK_HOSTS and not self.api_keys:
            raise ValueError(
                f"host {self.host!r} is not loopback and no API key is configured; "
                "set API_KEYS or listen on 127.0.0.1"
            )
        return self


def _value(text: str) -> Any:
    """What a file holds: JSON where it is a list or an object, else the text itself."""
    return json.loads(text) if text.startswith(("[", "{")) else text
