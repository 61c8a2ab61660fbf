"""A fake synthesizer that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synthrep_generator.synthesis import FakeSynthesizer, ImageTask, Recipe


class CountingFakeSynthesizer(FakeSynthesizer):
    """Its `passes` are the numbers of images that it was asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.passes: list[int] = []

    def generate(self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Any) -> list[Any]:
        """See Synthesizer."""
        self.passes.append(len(tasks))
        return super().generate(tasks, recipe, on_step)
