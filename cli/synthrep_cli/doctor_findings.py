"""What a check of `synthrep doctor` has to say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["ok", "warn", "fail"]


class Finding(BaseModel):
    """The outcome of a check: one sentence, and what to do about it unless all is well.

    `warn` is what works and should be known, `fail` what does not work or loses data.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    state: State
    found: str
    next_step: str = ""
