"""Fields of a request's part on the command line: `name=value,name=value`."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

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
