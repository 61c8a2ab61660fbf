"""Dealing prompts out to components: exact, even, in both directions, without a table."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthrep_generator.mixture import Deal

weights = st.lists(
    st.floats(1e-3, 1e6, allow_nan=False, allow_infinity=False), min_size=1, max_size=16
)


@given(st.integers(1, 400), weights)
def test_each_prompt_goes_to_one_component_by_its_share(num: int, weights: list[float]) -> None:
    deal = Deal(num, weights)
    dealt = [deal.component(index) for index in range(num)]
    for component, weight in enumerate(weights):
        members = [index for index in range(num) if dealt[index] == component]
        assert sorted(deal.indices(component, 0, num)) == members
        assert deal.count(component) == len(members)
        assert abs(len(members) - num * weight / sum(weights)) < 1 + 1e-6


@given(st.integers(1, 300), weights, st.integers(1, 9))
def test_stretches_of_a_component_hold_each_prompt_once(
    num: int, weights: list[float], length: int
) -> None:
    deal = Deal(num, weights)
    for component in range(len(weights)):
        stretches = [
            deal.indices(component, start, start + length)
            for start in range(0, deal.count(component), length)
        ]
        assert all(stretch == sorted(stretch) for stretch in stretches)
        assert all(len(stretch) == length for stretch in stretches[:-1])
        found = [index for stretch in stretches for index in stretch]
        assert sorted(found) == deal.indices(component, 0, num)


def test_one_component_keeps_the_order_of_the_batch() -> None:
    deal = Deal(10, [0.3])
    assert deal.indices(0, 0, 4) + deal.indices(0, 4, 99) == list(range(10))


@pytest.mark.parametrize("num", [1000, 1024, 9973, 100_000])
def test_every_stretch_of_a_batch_has_about_its_share(num: int) -> None:
    deal = Deal(num, [5, 3, 2])
    for start in range(0, num - 100, 37):
        dealt = [deal.component(index) for index in range(start, start + 100)]
        for component, wanted in enumerate((50, 30, 20)):
            assert abs(dealt.count(component) - wanted) <= 6


def test_a_component_is_spread_over_the_batch() -> None:
    places = Deal(10_000, [1, 9]).indices(0, 0, 1000)
    assert max(b - a for a, b in pairwise(places)) <= 30


def test_a_million_prompts_cost_no_table() -> None:
    began = time.process_time()
    deal = Deal(10**6, [1 / 3, 2, 0.1])
    assert sum(map(deal.count, range(3))) == 10**6
    index = deal.indices(1, 500_000, 500_001)[0]
    assert deal.component(index) == 1
    assert time.process_time() - began < 0.1
