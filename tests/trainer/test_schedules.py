import math
from itertools import pairwise

import pytest

from synthrep_trainer.schedules import cosine, linear, warmup_cosine_lr

RUN = {"peak_lr": 3.2e-3, "warmup_steps": 10, "total_steps": 110}


def test_warmup_rises_linearly_and_its_first_update_moves():
    rates = [warmup_cosine_lr(step, **RUN) for step in range(10)]
    assert rates == pytest.approx([3.2e-4 * (step + 1) for step in range(10)])


def test_rate_follows_a_cosine_after_the_warmup():
    for step in range(10, 110):
        expected = 3.2e-3 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert warmup_cosine_lr(step, **RUN) == pytest.approx(expected)


def test_rate_peaks_where_the_warmup_ends_and_only_falls_from_there():
    rates = [warmup_cosine_lr(step, **RUN) for step in range(110)]
    assert rates[9] == rates[10] == max(rates) == pytest.approx(3.2e-3)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] > 0


@pytest.mark.parametrize("step", [110, 111, 10**9])
def test_rate_stays_at_its_final_value_past_the_end(step):
    assert warmup_cosine_lr(step, **RUN) == pytest.approx(0)
    assert warmup_cosine_lr(step, **RUN, final_lr=1e-5) == pytest.approx(1e-5)


def test_run_without_warmup_starts_at_the_peak():
    assert warmup_cosine_lr(0, peak_lr=0.1, warmup_steps=0, total_steps=5) == pytest.approx(0.1)


def test_cosine_runs_both_ways_with_its_middle_half_way():
    assert cosine(0, start=0.994, end=1.0, num_steps=10) == pytest.approx(0.994)
    assert cosine(5, start=0.04, end=0.2, num_steps=10) == pytest.approx(0.12)
    assert cosine(10, start=0.994, end=1.0, num_steps=10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("step", "warmup_steps", "total_steps"), [(-1, 0, 5), (0, 5, 5), (0, -1, 5), (0, 0, 0)]
)
def test_impossible_schedules_are_refused(step, warmup_steps, total_steps):
    with pytest.raises(ValueError, match="expected|step"):
        warmup_cosine_lr(step, peak_lr=1.0, warmup_steps=warmup_steps, total_steps=total_steps)


def test_a_line_goes_from_start_to_end_and_stays():
    values = [linear(step, start=0.04, end=0.07, num_steps=3) for step in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear(0, start=0.04, end=0.07, num_steps=0) == 0.07
