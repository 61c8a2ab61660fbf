"""Order is arithmetic: stable for ever, fair, and blind to what is left out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from synthrep_trainer.order import draw_images, is_held_out, window_order

GROUPS = np.arange(500)


def test_order_never_changes_between_versions():
    # From a scalar SplitMix64 in plain Python integers.
    assert window_order(3, 1, np.arange(8)).tolist() == [6, 1, 2, 3, 4, 7, 0, 5]
    assert draw_images(3, 5, 2, num_images=10, num_drawn=4) == [6, 0, 7, 5]


def test_leaving_a_group_out_keeps_the_order_of_the_rest():
    whole = window_order(1, 4, GROUPS)
    assert window_order(1, 4, GROUPS[GROUPS % 3 > 0]).tolist() == whole[whole % 3 > 0].tolist()


def test_windows_and_seeds_have_orders_of_their_own():
    orders = [window_order(seed, window, GROUPS).tolist() for seed in (1, 2) for window in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == GROUPS.tolist() for order in orders)


def test_every_place_of_a_window_is_equally_likely():
    places = np.array([window_order(0, w, np.arange(10)) for w in range(2000)])
    counts = np.array([np.bincount(column, minlength=10) for column in places.T])
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 45 < chi_square < 130  # 81 degrees of freedom, p > 0.0005 on either side


@pytest.mark.parametrize(("num_images", "num_drawn"), [(10, 4), (10, 6), (7, 3), (4, 4), (3, 5)])
def test_images_are_used_evenly_at_every_moment(num_images, num_drawn):
    uses: Counter = Counter(dict.fromkeys(range(num_images), 0))
    for use in range(2 * num_images):
        drawn = draw_images(0, 9, use, num_images=num_images, num_drawn=num_drawn)
        assert len(set(drawn)) == min(num_images, num_drawn)
        uses.update(drawn)
        assert max(uses.values()) - min(uses.values()) <= 1


def test_walks_over_a_group_are_shuffled_anew():
    walks = {tuple(draw_images(0, 9, use, num_images=6, num_drawn=6)) for use in range(20)}
    assert len(walks) > 15


def test_a_share_of_captions_is_held_out_whatever_the_run():
    ids = np.random.default_rng(0).integers(0, 2**60, 100_000)
    few, many = is_held_out(ids, 0.02), is_held_out(ids, 0.3)
    assert few.mean() == pytest.approx(0.02, abs=0.002)
    assert many.mean() == pytest.approx(0.3, abs=0.006)
    assert many[few].all()
    assert not is_held_out(ids, 0.0).any()
