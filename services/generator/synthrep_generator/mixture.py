"""Deals the prompts of a batch out to the components of its mixture; pure functions of numbers.

Prompt `i` of `N` stands at position `i * g mod N` of a second order, with `g` coprime to `N` and
next to `N` over the golden ratio. Each component owns a stretch of that order as long as its
share, so its count is exact within one prompt, and its prompts lie evenly over the batch, whatever
the order of the captions. Both directions cost a few integer operations, and nothing is stored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import floor, gcd, isqrt


class Deal:
    """Which component makes which prompt, for `num_prompts` (1 or more) and positive weights."""

    def __init__(self, num_prompts: int, weights: Sequence[float]) -> None:
        shares = list(accumulate(map(Fraction, weights)))  # exact, so equal everywhere
        ends = (floor(num_prompts * share / shares[-1]) for share in shares)
        self._bounds = [0, *ends]
        self._num_prompts = num_prompts
        self._step = 1 if len(weights) == 1 else _golden_step(num_prompts)
        self._back = pow(self._step, -1, num_prompts)

    def count(self, component: int) -> int:
        """Prompts of a component."""
        return self._bounds[component + 1] - self._bounds[component]

    def component(self, index: int) -> int:
        """The component that makes a prompt."""
        return bisect_right(self._bounds, index * self._step % self._num_prompts) - 1

    def indices(self, component: int, start: int, stop: int) -> list[int]:
        """The prompts `start` to `stop` of a component, fewer at its end, in rising order."""
        first = self._bounds[component]
        positions = range(first + start, min(first + stop, self._bounds[component + 1]))
        return sorted(position * self._back % self._num_prompts for position in positions)


def _golden_step(num_prompts: int) -> int:
    step = max(1, (isqrt(5 * num_prompts**2) - num_prompts) // 2)
    while gcd(step, num_prompts) != 1:
        step += 1
    return step
