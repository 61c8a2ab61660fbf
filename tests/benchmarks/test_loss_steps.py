"""Both sides of the loss's benchmark compute the same value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.harness import in_process
from benchmarks.loss.steps import prepared, step_megabytes


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("ours", "peer", "ranks"),
    [
        ("ours", "published", 1),
        ("our_tile", "published_tile", 2),
        ("our_tile", "published_tile", 4),
    ],
)
def test_both_sides_compute_the_same(ours, peer, ranks):
    embeddings = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for name in (ours, peer):
        leaf = embeddings.clone().requires_grad_()
        loss = prepared(name, ranks)(leaf, torch.arange(64) // 8)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_dense_side_is_seen_to_hold_its_matrices():
    matrix_megabytes = 2048 * 2048 * 4 / 1e6
    assert in_process(step_megabytes, name="published", rows=2048) > 2 * matrix_megabytes
