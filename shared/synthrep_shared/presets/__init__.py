"""Training recipes by name: the rows that papers publish, with command, cost and expected numbers.

Each `NAME.toml` beside this file is one recipe; its first lines say in words what it is, and where
it departs from what was published. `synthrep train --preset NAME` starts it.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_shared.errors import SynthRepError

_SUFFIX = ".toml"


class PresetError(SynthRepError):
    """There is no such recipe, or its file cannot be read."""


class Expected(BaseModel):
    """A published number, as a fraction, and who says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    protocol: str
    metric: str
    value: float
    source: str


class Preset(BaseModel):
    """A recipe; `request` has fields of RunRequest, all but the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: dict[str, Any]
    commands: list[str] = []
    cost: str = ""
    sources: list[str] = []
    expected: list[Expected] = []


def preset_names() -> list[str]:
    """The names of all recipes, in alphabetical order."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(_SUFFIX) for f in files if f.name.endswith(_SUFFIX))


def load_preset(name: str) -> Preset:
    """The recipe of that name; raises PresetError, with the names that there are."""
    if name not in preset_names():
        raise PresetError(f"there is no preset {name!r}; there are {', '.join(preset_names())}")
    return _parse(resources.files(__name__).joinpath(name + _SUFFIX).read_text("utf-8"), name)


def read_preset(path: Path) -> Preset:
    """The recipe in a file of one's own; raises PresetError."""
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PresetError(f"{path} cannot be read: {error}") from error


def _parse(text: str, name: str) -> Preset:
    try:
        return Preset.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise PresetError(f"{name} is no recipe: {error}") from error
