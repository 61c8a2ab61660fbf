"""Both sides of the probe's benchmark solve the same problem, and are judged by its formula."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.probe.fits import Size, draw, fit_s

SIZE = Size(rows=240, dim=12, classes=4)
STRENGTHS = (1.0, 100.0)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    for name in ("ours", "cold", "warm", "reference"):
        fit_s(name, SIZE, STRENGTHS, 1e-8, str(folder / name))
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize("peer", ["cold", "warm", "reference"])
def test_both_sides_reach_the_same_objective_and_accuracy(judged, peer):
    for strength in map(repr, STRENGTHS):
        ours, theirs = judged["ours"][strength], judged[peer][strength]
        assert ours["objective"] == pytest.approx(theirs["objective"], rel=1e-3)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.005)
        assert theirs["converged"]


def test_a_solver_that_stops_at_once_is_seen(judged, tmp_path):
    fit_s("cold", SIZE, STRENGTHS, 1e3, str(tmp_path / "loose"))
    loose = json.loads((tmp_path / "loose").read_text())
    assert loose["1.0"]["objective"] > 1.01 * judged["ours"]["1.0"]["objective"]


def test_features_are_standardised_and_classes_can_be_learnt():
    train, labels, test, truth = draw(SIZE)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    assert (len(train), len(test), set(labels.tolist())) == (240, 2000, {0, 1, 2, 3})
    assert train.dtype == np.float32
    assert len(truth) == len(test)
