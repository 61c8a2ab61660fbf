"""Real reconcilers and workers on an embedded Valkey, with the fake model."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.redis
PROMPTS = [f"bird number {i}" for i in range(10)]


def test_a_batch_completes(generator_stack) -> None:
    stack = generator_stack()
    stack.accept(PROMPTS)
    stack.start("reconciler")
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 10)
    assert sorted(stack.decided()) == [("b0", i) for i in range(10)]
