"""The fake model is as deterministic and as seeded as a real one must be."""

from __future__ import annotations

import numpy as np
import pytest

from synthrep_generator.errors import PermanentPromptError
from synthrep_generator.synthesis import (
    FakeSynthesizer,
    ImageTask,
    Recipe,
    paint,
    recipe_from_settings,
)
from synthrep_shared.messages import GenerationSettings

RECIPE = Recipe(2.0, 3, "ddim", "")


@pytest.mark.parametrize("side_px", [4, 8, 17])
def test_pixels_are_a_function_of_prompt_and_seed(side_px: int) -> None:
    image = paint(ImageTask("a bird", 1), side_px)
    assert image.shape == (side_px, side_px, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, paint(ImageTask("a bird", 1), side_px))
    for other in (ImageTask("a bird", 2), ImageTask("a bee", 1)):
        assert not np.array_equal(image, paint(other, side_px))


def test_pixels_do_not_depend_on_batch_mates() -> None:
    tasks = [ImageTask("a bird", seed) for seed in range(3)]
    fake = FakeSynthesizer(store_px=8)
    together = fake.generate(tasks, RECIPE, lambda: None)
    alone = [fake.generate([task], RECIPE, lambda: None)[0] for task in tasks]
    assert np.array_equal(together, alone)


def test_a_refused_prompt_comes_back_in_its_place() -> None:
    tasks = [ImageTask("a", 0), ImageTask("b [fake:refuse]", 0), ImageTask("c", 0)]
    first, second, third = FakeSynthesizer(store_px=8).generate(tasks, RECIPE, lambda: None)
    assert isinstance(second, PermanentPromptError)
    assert np.array_equal([first, third], [paint(tasks[0], 8), paint(tasks[2], 8)])


def test_what_a_step_raises_ends_the_work() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        FakeSynthesizer(store_px=8, delay_s=60).generate([ImageTask("a", 0)], RECIPE, stop)


def test_a_recipe_needs_every_default_filled_in() -> None:
    full = GenerationSettings(guidance_scale=2.0, num_inference_steps=3, scheduler="ddim")
    assert recipe_from_settings(full) == RECIPE
    with pytest.raises(ValueError, match="default"):
        recipe_from_settings(full.model_copy(update={"scheduler": None}))
