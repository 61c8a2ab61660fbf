"""Field types and the bases of requests and answers.

Requests refuse unknown fields and wrong types. Fractions are 0-1, times RFC 3339, ids opaque.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from synthrep_shared.samples import DATASET_PATTERN, normalise_caption

State = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
MAX_PROMPT_CHARACTERS = 1000
MAX_PROMPTS_PER_REQUEST = 1000


class Request(BaseModel):
    """Base of request bodies: strict types, unknown fields refused, finite numbers only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # logs hold no prompts
    )


class Answer(BaseModel):
    """Base of answers; a client ignores fields that a newer service adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


def clean_text(text: str) -> str:
    """The normalised text; raises ValueError for what no caption may hold."""
    for character in "" if text.isprintable() else text:
        category = unicodedata.category(character)
        if category in ("Cs", "Co", "Cn") or (category == "Cc" and character not in "\t\n\r"):
            raise ValueError("control, surrogate, private and unassigned characters are refused")
    return normalise_caption(text)


def clean_prompt(text: str) -> str:
    """As `clean_text`; raises ValueError for an empty prompt too."""
    prompt = clean_text(text)
    if not prompt:
        raise ValueError("a prompt must not be empty")
    return prompt


Prompt = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
    AfterValidator(clean_prompt),
]
DatasetName = Annotated[str, StringConstraints(pattern=DATASET_PATTERN)]
ProbeSetName = Annotated[
    str, StringConstraints(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
]
Alias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class HealthView(Answer):
    """Answer of the health checks."""

    status: Literal["ok"]


class FieldProblem(Answer):
    """One place of a request that does not fit."""

    field: str
    message: str


class Problem(Answer):
    """Problem details (RFC 9457): the body of every error, `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str | None = None
    errors: list[FieldProblem] | None = None


T = TypeVar("T")


class Page(Answer, Generic[T]):
    """Answer of every list."""

    items: list[T]
    next_cursor: str | None
