"""Few-shot episodes."""

from __future__ import annotations

import numpy as np
import pytest

from synthrep_trainer.probe_fewshot import Episode, FewShotProtocol, solve
from synthrep_trainer.probe_protocols import Exam, FittingPart

NAMES = tuple("abcdefg")


def made(seed, *, spread, per_class=12, num_classes=7):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(num_classes, 16))
    labels = np.repeat(np.arange(num_classes), per_class)
    features = 3 + centres[labels] + spread * rng.normal(size=(len(labels), 16))
    return features.astype(np.float32), labels


def judge(spread, *, seed=0, episodes=60, **options):
    features, labels = made(0, spread=spread)
    test, truth = made(1, spread=spread)
    part = FittingPart(features, labels, np.zeros(len(labels), bool))
    protocol = FewShotProtocol(episodes=episodes)
    exam = Exam(truth, NAMES, "accuracy", seed)
    return protocol.judge(part, protocol.select(part, "accuracy").chosen, test, exam)


def test_episodes_of_clear_classes_are_solved():
    verdict = judge(0.01)
    assert verdict.score.value == 1
    assert [row.value for row in verdict.per_class] == [1] * 7
    assert {row.n_test for row in verdict.per_class} == {12}


def test_episodes_of_noise_are_solved_by_chance():
    verdict = judge(1000.0, episodes=300)
    assert verdict.score.ci95[0] < 0.25
    assert verdict.score.value == pytest.approx(0.2, abs=0.05)


def test_more_episodes_make_a_narrower_interval():
    few, many = judge(2.0, episodes=50).score, judge(2.0, episodes=800).score
    assert few.ci95[0] < few.value < few.ci95[1]
    ratio = (few.ci95[1] - few.ci95[0]) / (many.ci95[1] - many.ci95[0])
    assert ratio == pytest.approx(4, rel=0.3)


def test_equal_seeds_draw_equal_episodes():
    assert judge(2.0) == judge(2.0)
    assert judge(2.0, seed=1) != judge(2.0)


def test_a_query_goes_to_the_nearest_mean_of_unit_rows_about_the_centre():
    """The slow way, on one episode."""
    features, labels = made(0, spread=1.5)
    test, truth = made(1, spread=1.5)
    classes = np.array([4, 0, 2])
    support = np.stack([np.flatnonzero(labels == c)[:5] for c in classes])
    queries = np.concatenate([np.flatnonzero(truth == c)[:6] for c in classes])
    episode = Episode(classes, support, queries, np.repeat(np.arange(3), 6))
    centre = features[support.ravel()].mean(0)
    expected = []
    for query, own in zip(queries, episode.truth, strict=True):
        row = (test[query] - centre) / np.linalg.norm(test[query] - centre)
        distances = []
        for rows in support:
            unit = [(features[r] - centre) / np.linalg.norm(features[r] - centre) for r in rows]
            distances.append(np.linalg.norm(row - np.mean(unit, 0)))
        expected.append(np.argmin(distances) == own)
    assert solve(features, test, episode).tolist() == expected
    assert not all(expected)


def test_a_class_with_few_test_images_asks_fewer_queries():
    protocol = FewShotProtocol(episodes=20)
    labels, truth = np.repeat(np.arange(5), 5), np.array([0, 1, 2, 3, 3, 4])
    for episode in protocol._draw(labels, Exam(truth, NAMES[:5], "accuracy", 0)):
        assert sorted(episode.queries) == list(range(6))
        assert (truth[episode.queries] == episode.classes[episode.truth]).all()
        assert (labels[episode.support] == episode.classes[:, None]).all()


def test_too_few_classes_with_enough_images_are_refused():
    labels = np.repeat(np.arange(5), [5, 5, 5, 5, 4])
    exam = Exam(np.arange(5), NAMES[:5], "accuracy", 0)
    with pytest.raises(ValueError, match="needs 5 classes .* there are 4"):
        next(FewShotProtocol()._draw(labels, exam))


def test_chance_is_one_of_the_ways():
    exam = Exam(np.arange(5), NAMES[:5], "accuracy", 0)
    assert FewShotProtocol().majority(np.arange(5), exam).value == 0.2
