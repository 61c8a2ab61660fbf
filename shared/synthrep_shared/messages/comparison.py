"""What the trainer says of comparisons: rows judged on sets, over seeds."""

from __future__ import annotations

from pydantic import Field

from synthrep_shared.messages.fields import Answer


class ComparisonCell(Answer):
    """One row on one set."""

    dataset: str
    row: str
    mean: float
    """Over seeds, as a fraction."""
    ci95: tuple[float, float]
    """Over seeds and test images."""
    best: bool
    """Whether no other row has a higher mean; raw pixels are no contender."""
    significant: bool
    """Whether it is best, and the interval of the difference to the second-best excludes 0."""


class ComparisonView(Answer):
    """The table of a comparison, as far as its runs have come."""

    id: str
    summary: tuple[ComparisonCell, ...]
    statement: tuple[str, ...] = ()
    """What the evidence says, a sentence each."""
    counted: dict[str, bool] = Field(default={})
    """Whether a set says enough to be counted."""
    failures: tuple[str, ...] = ()
    """Runs that failed, a sentence each."""
