"""Seeded blocks repeat themselves and leave no trace."""

from __future__ import annotations

import torch

from synthrep_trainer.randomness import seed_of, seeded


def test_equal_seeds_draw_equally_and_leave_the_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draws = []
    for parts in ((1, 2), (1, 2), (2, 1), (1, 2, 0)):
        with seeded(*parts):
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


def test_seeds_never_change_between_versions():
    assert seed_of(3, 7) == 2918747049622106383
