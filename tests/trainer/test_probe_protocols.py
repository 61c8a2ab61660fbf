"""Choosing on validation, and predicting after it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from synthrep_trainer import probe_protocols
from synthrep_trainer.linear_probe import STRENGTHS
from synthrep_trainer.probe_protocols import FittingPart, LinearProtocol, NeighbourProtocol
from synthrep_trainer.probe_session import validation_mask


def made_part(seed, num_rows=240, dim=20, num_classes=4):
    """Noisy classes, so that an inner strength is best."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    features = (5 + 2 * rng.normal(size=(num_rows, dim)) + centres[labels]).astype(np.float32)
    return FittingPart(features, labels, validation_mask(labels, seed=seed))


@pytest.fixture
def part():
    return made_part(0)


def test_linear_tries_all_45_strengths_and_takes_the_best(part):
    selection = LinearProtocol().select(part, "accuracy")
    tried = {point["strength"]: point["val"] for point in selection.curve}
    assert list(tried) == list(STRENGTHS)
    best = max(tried.values())
    # The strongest among equals.
    assert selection.chosen == max(s for s, value in tried.items() if value == best)


def test_linear_scores_validation_with_statistics_of_train_alone(part):
    """Some numbers of the curve, the slow way; a row on the edge may fall to the other side."""
    selection = LinearProtocol().select(part, "accuracy")
    train, val = part.features[~part.is_val], part.features[part.is_val]
    mean, deviation = train.mean(0), train.std(0)
    for point in selection.curve[::11]:
        model = LogisticRegression(C=1 / point["strength"], tol=1e-8, max_iter=10_000)
        model.fit((train - mean) / deviation, part.labels[~part.is_val])
        expected = model.score((val - mean) / deviation, part.labels[part.is_val])
        assert point["val"] == pytest.approx(expected, abs=1.01 / part.is_val.sum())


def test_linear_refits_on_train_and_val_with_their_statistics(part):
    test = made_part(5, num_rows=400).features
    found = LinearProtocol().predict(part, 10.0, test)
    mean, deviation = part.features.mean(0), part.features.std(0)
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000)
    model.fit((part.features - mean) / deviation, part.labels)
    assert (found == model.predict((test - mean) / deviation)).mean() > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_coarse_search_tries_a_third_and_finds_as_good_a_strength(seed):
    part = made_part(seed)
    full = LinearProtocol().select(part, "accuracy")
    coarse = LinearProtocol(search="coarse").select(part, "accuracy")
    assert len(coarse.curve) <= 18
    # Each strength comes from another path, so a row on the edge may fall either way.
    of = {point["strength"]: point["val"] for point in full.curve}
    for point in coarse.curve:
        assert point["val"] == pytest.approx(of[point["strength"]], abs=1.01 / part.is_val.sum())
    assert of[coarse.chosen] >= of[full.chosen] - 3.01 / part.is_val.sum()
    tried = [STRENGTHS.index(point["strength"]) for point in coarse.curve]
    centre = STRENGTHS.index(coarse.chosen)
    assert {i for i in range(centre - 1, centre + 2) if 0 <= i < 45} <= set(tried)


def test_coarse_search_ends_three_decades_after_the_best(part):
    coarse = LinearProtocol(search="coarse").select(part, "accuracy")
    decades = [s for s in (point["strength"] for point in coarse.curve) if s in STRENGTHS[::4]]
    of = {point["strength"]: point["val"] for point in coarse.curve}
    best = max(decades, key=lambda strength: (of[strength], strength))
    assert sum(strength < best for strength in decades) == 3


def test_neighbours_vote_with_the_weight_of_their_cosine(part):
    test = made_part(6, num_rows=57).features
    found = NeighbourProtocol().predict(part, 20, test)
    for row, predicted in zip(test, found, strict=True):
        cosines = part.features @ row
        cosines /= np.linalg.norm(part.features, axis=1) * np.linalg.norm(row)
        votes = np.zeros(4)
        for index in np.argsort(-cosines)[:20]:
            votes[part.labels[index]] += np.exp(cosines[index] / 0.07)
        assert predicted == votes.argmax()


def test_neighbours_are_sought_in_train_alone_while_choosing(part):
    selection = NeighbourProtocol().select(part, "accuracy")
    train = FittingPart(part.features[~part.is_val], part.labels[~part.is_val], part.is_val)
    predicted = NeighbourProtocol().predict(train, 20, part.features[part.is_val])
    value = (predicted == part.labels[part.is_val]).mean()
    assert selection.chosen == 20
    assert selection.curve == ({"neighbours": 20, "val": value},)


def test_neighbours_of_many_rows_come_in_chunks(part, monkeypatch):
    test = made_part(7, num_rows=50).features
    whole = NeighbourProtocol().predict(part, 20, test)
    monkeypatch.setattr(probe_protocols, "_CHUNK_ROWS", 7)
    np.testing.assert_array_equal(NeighbourProtocol().predict(part, 20, test), whole)


def test_a_bank_smaller_than_the_neighbourhood_votes_as_a_whole():
    features = np.eye(3, dtype=np.float32)
    part = FittingPart(features, np.array([0, 1, 2]), np.zeros(3, bool))
    assert NeighbourProtocol().predict(part, 20, features).tolist() == [0, 1, 2]


def test_a_row_of_zeros_has_no_direction_and_no_effect(part):
    found = NeighbourProtocol().predict(part, 20, np.zeros((1, 20), np.float32))
    assert found[0] in range(4)
