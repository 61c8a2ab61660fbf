"""Models on this machine: the cache that `synthrep models pull` fills, and its manifests.

A manifest is written last, so that a folder with one is complete; it has each file's size and
hash. The sizes are looked at whenever a model is loaded, the hashes at a pull and on request.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_generator.errors import (
    ModelConfigError,
    ModelFilesMissingError,
    UnknownModelError,
)
from synthrep_generator.model_catalogue import CATALOGUE
from synthrep_generator.pipeline_kinds import KINDS
from synthrep_generator.settings import GeneratorSettings, ModelConfig, catalogue_model
from synthrep_shared.storage import sha256_file

MANIFEST = "manifest.json"


class FileRecord(BaseModel):
    """A file of a model; its name is relative to the model's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What was pulled: from where, which commit, which files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    repo: str
    revision: str
    licence: str
    files: tuple[FileRecord, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def pull_command(alias: str) -> str:
    """What to do about a model of the catalogue that is not here."""
    return f"run `synthrep models pull {alias}`"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a model's folder; None if it has none. ModelFilesMissingError: no use."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelFilesMissingError(f"cannot read {folder / MANIFEST}: {error}") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ModelFilesMissingError(f"{folder / MANIFEST} is malformed") from error


def read_index(folder: Path) -> dict[str, Any] | None:
    """What a model's folder says of its pipeline; None where there is nothing readable."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return index if isinstance(index, dict) else None


def wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or of another size."""
    return [file.name for file in manifest.files if _size(folder / file.name) != file.bytes]


def damaged_files(
    folder: Path, manifest: Manifest, on_bytes: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Files that are missing or changed; reads all of them and tells of the bytes read."""
    damaged = []
    for file in manifest.files:
        path = folder / file.name
        if _size(path) != file.bytes or sha256_file(path) != file.sha256:
            damaged.append(file.name)
        on_bytes(file.bytes)
    return damaged


def find_model(settings: GeneratorSettings, alias: str) -> ModelConfig:
    """The configured or pulled model of an alias.

    Raises UnknownModelError, or ModelFilesMissingError for one of the catalogue that is not here.
    """
    configured = settings.models.get(alias)
    if configured is not None:
        return configured
    if alias not in CATALOGUE:
        raise UnknownModelError(f"model {alias!r} is not configured here")
    fields = catalogue_model(alias, settings.model_cache)
    manifest = read_manifest(fields["path"])
    if manifest is None:
        raise ModelFilesMissingError(pull_command(alias))
    return ModelConfig.model_validate(fields | {"revision": manifest.revision})


def usable_models(settings: GeneratorSettings) -> dict[str, ModelConfig]:
    """Every model that clients may name, by alias: the configured ones and those in the cache."""
    found = dict(settings.models)
    for alias in [alias for alias in CATALOGUE if alias not in found]:
        with suppress(ModelFilesMissingError):
            found[alias] = find_model(settings, alias)
    return found


def check_model_files(alias: str, model: ModelConfig) -> None:
    """Raises ModelFilesMissingError if the model's folder is not here or not whole by its sizes."""
    if not model.path.is_dir():
        where = pull_command(alias) if alias in CATALOGUE else f"no model folder {model.path}"
        raise ModelFilesMissingError(where)
    manifest = read_manifest(model.path)
    if manifest is None:
        if alias in CATALOGUE and not (model.path / "model_index.json").exists():
            raise ModelFilesMissingError(pull_command(alias))
    elif wrong := wrong_sizes(model.path, manifest):
        raise ModelFilesMissingError(
            f"{wrong[0]} of {alias} is not as it was pulled: {pull_command(alias)}"
        )


def check_recipe(model: ModelConfig, *, scheduler: str | None, negative_prompt: str) -> None:
    """Raises ModelConfigError if the model, where its files are here, cannot follow the settings.

    A service without the files lets the worker judge, which records the prompts as failed.
    """
    index = read_index(model.path)
    kind = None if index is None else KINDS.get(str(index.get("_class_name")))
    if kind is not None and (reason := kind.refusal(scheduler or "", negative_prompt)):
        raise ModelConfigError(reason)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
