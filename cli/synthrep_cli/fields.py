"""Fields of requests, by `name=value,name=value` on the command line, a file or a preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from synthrep_shared.presets import PresetError, load_preset, read_preset

M = TypeVar("M", bound=BaseModel)


def parse_fields(text: str, model: type[M], *, option: str) -> M:
    """What `text` says of a `model`; `on` leaves every field as it is.

    Raises typer.BadParameter, which names the option, for what the model does not take.
    """
    fields: dict[str, Any] = {}
    for pair in [] if text == "on" else text.split(","):
        name, sign, value = pair.partition("=")
        if not sign:
            raise typer.BadParameter(f"expected name=value, got {pair!r}", param_hint=option)
        try:
            fields[name.strip()] = json.loads(value)
        except ValueError:
            fields[name.strip()] = value.strip()
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields)
        message = f"{place}: {first['msg']}; the fields are {known}"
        raise typer.BadParameter(message, param_hint=option) from error


def run_fields(preset: str | None, config: Path | None) -> dict[str, Any]:
    """Fields of a run by a preset, or as a file has them instead; raises typer.BadParameter."""
    try:
        published = load_preset(preset).request if preset else {}
        own = _read_fields(config)
    except PresetError as error:
        raise typer.BadParameter(str(error)) from error
    if "max_images" in own:
        published.pop("max_steps", None)
    return published | own


def _read_fields(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if config.suffix == ".toml":
        return read_preset(config).request
    try:
        fields = json.loads(config.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"{config} is not JSON: {error}", param_hint="--config") from error
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{config} holds no JSON object", param_hint="--config")
    return fields
