"""The paired bootstrap against slow, obvious arithmetic; what may be called significant."""

from __future__ import annotations

import numpy as np
import pytest

from synthrep_cli.comparison_statistics import draw_weights, estimate, judge, unpack_hits
from synthrep_trainer.probe_scores import pack_hits, score

SIZES = (700, 300, 200)


def hits(dice: np.random.Generator, rate: float, seeds: int = 3) -> dict[int, np.ndarray]:
    return {seed: dice.random(sum(SIZES)) < rate for seed in range(seeds)}


@pytest.mark.parametrize("by_class", [False, True])
def test_interval_is_that_of_the_loop_over_resamples(by_class):
    dice = np.random.default_rng(1)
    sizes = (5, 0, 3)
    values = (dice.random((3, 8)) < 0.6).astype(float)
    found = estimate(values, sizes, by_class=by_class, seed=4, resamples=300)

    seeds, images = draw_weights(3, sizes, by_class=by_class, seed=4, resamples=300)
    classes = np.array([0] * 5 + [1] * 3)
    means = []
    for of_seeds, of_images in zip(seeds, images, strict=True):
        drawn_seeds = np.repeat(np.arange(3), np.rint(of_seeds * 3).astype(int))
        scale = np.where(classes == 0, 10, 6) if by_class else np.full(8, 8)
        drawn = np.repeat(np.arange(8), np.rint(of_images * scale).astype(int))
        assert (len(drawn_seeds), len(drawn)) == (3, 8)
        per_seed = []
        for s in drawn_seeds:
            row, of = values[s, drawn], classes[drawn]
            parts = [row[of == c].mean() for c in (0, 1)] if by_class else [row.mean()]
            per_seed.append(np.mean(parts))
        means.append(np.mean(per_seed))
    assert found.ci95 == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))


@pytest.mark.parametrize(("metric", "by_class"), [("accuracy", False), ("mean_per_class", True)])
def test_mean_is_the_score_of_the_probe(metric, by_class):
    dice = np.random.default_rng(2)
    truth = np.repeat([0, 1, 2], (20, 7, 5))
    dice.shuffle(truth)
    predicted = dice.integers(0, 3, 32)
    bits = unpack_hits(pack_hits(truth, predicted), 32)[None].astype(float)
    found = estimate(bits, (20, 7, 5), by_class=by_class)
    assert found.mean == pytest.approx(score(metric, truth, predicted))


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_never_significant(seeds):
    dice = np.random.default_rng(3)
    rows = {"stablerep": hits(dice, 0.9, seeds), "clip-real": hits(dice, 0.2, seeds)}
    _, verdict = judge(rows, SIZES, by_class=False, candidates=list(rows))
    assert verdict.best == "stablerep"
    assert verdict.difference.ci95[0] > 0.5
    assert not verdict.is_significant


def test_seeds_that_only_one_row_has_do_not_count():
    dice = np.random.default_rng(3)
    rows = {"stablerep": hits(dice, 0.9, 3), "clip-real": hits(dice, 0.2, 1)}
    _, verdict = judge(rows, SIZES, by_class=False, candidates=list(rows))
    assert not verdict.is_significant


def test_a_clear_difference_is_significant_and_a_draw_is_not():
    dice = np.random.default_rng(4)
    rows = {"stablerep": hits(dice, 0.6), "clip-real": hits(dice, 0.5), "pixels": hits(dice, 0.4)}
    means, verdict = judge(rows, SIZES, by_class=False, candidates=["stablerep", "clip-real"])
    assert (verdict.best, verdict.second) == ("stablerep", "clip-real")
    assert verdict.is_significant
    assert verdict.is_counted
    assert set(means) == set(rows)
    rows["clip-real"] = {s: np.roll(h, 1) for s, h in rows["stablerep"].items()}
    _, verdict = judge(rows, SIZES, by_class=False, candidates=["stablerep", "clip-real"])
    assert not verdict.is_significant


def test_seeds_that_disagree_forbid_the_claim_however_many_images_there_are():
    wins, loses = np.ones(1200, bool), np.zeros(1200, bool)
    rows = {"a": {0: wins, 1: loses, 2: wins}, "b": {0: loses, 1: wins, 2: loses}}
    _, verdict = judge(rows, SIZES, by_class=False, candidates=["a", "b"])
    assert verdict.best == "a"
    assert not verdict.is_significant


def test_sets_that_say_little_are_not_counted():
    dice = np.random.default_rng(5)
    rows = {"stablerep": hits(dice, 0.5), "pixels": hits(dice, 0.8, 1)}
    _, verdict = judge(rows, SIZES, by_class=False, candidates=["stablerep"])
    assert (verdict.is_counted, verdict.why_not) == (False, "no trained row beats raw pixels")
    few = {"stablerep": {0: np.ones(30, bool)}}
    _, verdict = judge(few, (30,), by_class=False, candidates=["stablerep"])
    assert verdict.why_not.startswith("30 test images")


def test_equal_rows_are_rarely_called_different():
    dice = np.random.default_rng(6)
    claims = 0
    for _ in range(100):
        apart = (dice.random((3, 200)) < 0.5) - (dice.random((3, 200)) < 0.5).astype(float)
        low, high = estimate(apart, (200,), by_class=False, resamples=400).ci95
        claims += low > 0 or high < 0
    assert claims <= 12


def test_hits_of_another_length_are_refused():
    with pytest.raises(ValueError, match="cannot be 20 images"):
        unpack_hits("ff", 20)
