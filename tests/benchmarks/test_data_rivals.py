"""What the peers of the data path are told to do."""

from __future__ import annotations

import re

import numpy as np

from benchmarks.data import rivals


def test_crops_for_spdl_lie_in_the_image_and_cover_the_shares_of_the_recipe():
    rng = np.random.default_rng(0)
    found = [re.search(r"crop=(\d+):(\d+):(\d+):(\d+)", rivals._filters(rng)) for _ in range(500)]
    crops = np.array([[int(number) for number in match.groups()] for match in found])
    sizes, corners = crops[:, :2], crops[:, 2:]
    assert (corners >= 0).all()
    assert (corners + sizes <= 256).all()
    shares, ratios = sizes.prod(1) / 256**2, sizes[:, 0] / sizes[:, 1]
    assert 0.07 < shares.min() < 0.12
    assert 0.9 < shares.max() <= 1
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.35


def test_half_of_the_crops_for_spdl_are_flipped():
    rng = np.random.default_rng(0)
    flipped = np.mean(["hflip" in rivals._filters(rng) for _ in range(500)])
    assert abs(flipped - 0.5) < 0.07
