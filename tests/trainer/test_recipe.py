"""What a request leaves open is as published; what it says is done."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from synthrep_shared.messages import RunRequest
from synthrep_trainer import recipe
from synthrep_trainer.records import RunRecord


def record(**fields):
    request = RunRequest(**({"dataset": "birds", "max_steps": 100} | fields))
    return RunRecord(id="r", request=request, created_at=datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("objective", "rows", "beta2", "has_average"),
    [
        ("stablerep", 4, 0.98, False), ("stablerep+", 4, 0.98, False), ("simclr", 2, 0.98, False),
        ("clip", 1, 0.98, False), ("synclr", 4, 0.999, True),
    ],
)  # fmt: skip
def test_each_objective_has_its_published_recipe(objective, rows, beta2, has_average):
    config = recipe.learner_config(record(objective=objective), "cpu")
    assert config.objective.rows_per_caption == rows
    assert config.betas == (0.9, beta2)
    assert config.has_moving_average == has_average
    assert config.precision == "fp32"
    assert config.max_skipped_steps == 0


def test_bf16_is_for_cuda_unless_asked_for():
    assert recipe.learner_config(record(), "cuda").precision == "bf16"
    assert recipe.learner_config(record(precision="fp32"), "cuda").precision == "fp32"
    assert recipe.learner_config(record(precision="bf16"), "cpu").precision == "bf16"


def test_skipping_is_bounded_and_only_on_request():
    skipping = record(non_finite="skip", max_skipped_steps=3)
    assert recipe.learner_config(skipping, "cpu").max_skipped_steps == 3


def test_rates_run_along_their_curves():
    rates = [recipe.rates(record(lr=0.1, warmup_fraction=0.1), step) for step in (1, 10, 100)]
    assert [r.lr for r in rates] == pytest.approx([0.01, 0.1, 0.0], abs=1e-3)
    assert {r.weight_decay for r in rates} == {0.1}
    assert {r.ema_decay for r in rates} == {None}


def test_a_rate_that_is_left_open_suits_the_objective():
    peaks = {
        objective: recipe.rates(record(objective=objective, warmup_fraction=0), 1).lr
        for objective in ("stablerep", "simclr", "clip", "stablerep+", "synclr")
    }
    assert peaks == {
        "stablerep": 1.5e-3, "simclr": 1.5e-3, "clip": 3e-4, "stablerep+": 3e-4, "synclr": 3e-4
    }  # fmt: skip


def test_synclr_averages_longer_and_longer_and_decay_may_rise():
    run = record(objective="synclr", max_steps=4000, weight_decay=0.04, final_weight_decay=0.2)
    rates = [recipe.rates(run, step) for step in (1, 2001, 4001)]
    assert [r.ema_decay for r in rates] == pytest.approx([0.994, 0.997, 1.0])
    assert [r.weight_decay for r in rates] == pytest.approx([0.04, 0.12, 0.2])


@pytest.mark.parametrize("max_steps", [1, 30, 50, 1000, 10_000])
def test_the_average_of_a_finished_synclr_run_has_forgotten_its_first_weights(max_steps):
    run = record(objective="synclr", max_steps=max_steps)
    kept = math.prod(recipe.rates(run, step).ema_decay for step in range(1, max_steps + 1))
    assert kept < 1e-4


def test_a_moving_average_keeps_its_decay_unless_told_otherwise():
    assert recipe.rates(record(ema_decay=0.9), 77).ema_decay == 0.9
    ending = recipe.rates(record(ema_decay=0.9, ema_final_decay=1.0), 101)
    assert ending.ema_decay == pytest.approx(1.0)


def test_synclr_views_are_of_two_kinds_and_small():
    run = record(objective="synclr", image_size=224, images_per_caption=2)
    plan = recipe.view_plan(run, patch_size_px=16)
    one, other, small = plan.augmentation, plan.odd_augmentation, plan.crop_augmentation
    assert (one.blur_probability, other.blur_probability, small.blur_probability) == (1, 0.1, 0.5)
    assert (one.solarise_probability, other.solarise_probability) == (0, 0.2)
    assert one.crop_scale == other.crop_scale == (0.32, 1.0)
    assert small.crop_scale == (0.08, 0.32)
    assert (one.image_size_px, small.image_size_px) == (224, 96)
    assert plan.crops_per_image == 2


@pytest.mark.parametrize(("size", "patch", "crop"), [(32, 4, 12), (16, 4, 8), (224, 14, 98)])
def test_small_crops_are_tiled_by_patches(size, patch, crop):
    plan = recipe.view_plan(record(objective="synclr", image_size=size), patch_size_px=patch)
    assert plan.crop_augmentation.image_size_px == crop


def test_a_crop_that_patches_do_not_tile_is_refused():
    run = record(objective="synclr", synclr={"crop_size": 10})
    with pytest.raises(ValueError, match="multiple of the patch"):
        recipe.view_plan(run, patch_size_px=4)


@pytest.mark.parametrize("objective", ["clip", "stablerep+", "stablerep"])
def test_captions_are_read_where_they_are_learned_from(objective):
    plan = recipe.view_plan(record(objective=objective, text={"context": 50}), patch_size_px=4)
    assert plan.text_context == (0 if objective == "stablerep" else 50)


def test_views_may_lose_resolution():
    plan = recipe.view_plan(record(downsample_probability=0.05), patch_size_px=4)
    assert plan.augmentation.downsample_probability == 0.05
