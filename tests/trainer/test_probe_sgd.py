"""Heads that SGD trains side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthrep_trainer import probe_sgd
from synthrep_trainer.probe_protocols import Exam, FittingPart
from synthrep_trainer.probe_session import validation_mask
from synthrep_trainer.probe_sgd import RATES, SgdProtocol

NAMES = ("a", "b", "c")


def made(seed, num_rows=300, scale=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 3
    centres = np.random.default_rng(9).normal(size=(3, 8))
    features = scale * (centres[labels] + rng.normal(size=(num_rows, 8)))
    return features.astype(np.float32), labels


def part_of(seed, **options):
    features, labels = made(seed, **options)
    return FittingPart(features, labels, validation_mask(labels, seed=0))


def plainly(features, labels, rate, protocol):
    """One head by torch's own layers, optimizer and schedule."""
    torch.manual_seed(protocol.seed)
    dim = features.shape[1]
    norm = torch.nn.BatchNorm1d(dim, affine=False, eps=1e-6)
    head = torch.nn.Linear(dim, 3)
    generator = torch.Generator().manual_seed(protocol.seed)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(dim, 1, 3, generator=generator)[:, 0].T)
        head.bias.zero_()
    size = protocol.batch_size
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * size / 256, momentum=0.9)
    steps = protocol.epochs * (len(features) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows, targets = torch.from_numpy(features), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(protocol.seed)
    for _ in range(protocol.epochs):
        order = torch.randperm(len(rows), generator=generator)
        for batch in order[: len(rows) // size * size].split(size):
            x = norm(rows[batch]) if protocol.batch_norm else rows[batch]
            loss = torch.nn.functional.cross_entropy(head(x), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    norm.eval()
    with torch.no_grad():
        return head(norm(rows) if protocol.batch_norm else rows).numpy()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_heads_are_those_that_torch_trains_one_by_one(batch_norm):
    features, labels = made(0, num_rows=105)
    protocol = SgdProtocol(batch_norm=batch_norm, epochs=4, batch_size=32)
    rates = (0.05, 0.5)
    heads = protocol.fit(features, labels, rates)
    for rate, head in zip(rates, heads, strict=True):
        expected = plainly(features, labels, rate, protocol)
        np.testing.assert_allclose(head.logits(features), expected, atol=2e-4)


def test_the_rate_that_does_best_on_validation_is_chosen_and_refitted():
    part, (test, truth) = part_of(0), made(1)
    protocol = SgdProtocol(epochs=20, batch_size=64)
    selection = protocol.select(part, "accuracy")
    of = {point["learning_rate"]: point["val"] for point in selection.curve}
    assert tuple(of) == RATES
    assert selection.chosen == min(r for r, value in of.items() if value == max(of.values()))
    exam = Exam(truth, NAMES, "accuracy", 0)
    verdict = protocol.judge(part, selection.chosen, test, exam)
    assert verdict.score.value > 0.6
    (refitted,) = protocol.fit(part.features, part.labels, [selection.chosen])
    np.testing.assert_array_equal(verdict.head.weights, refitted.weights)


def test_rows_that_validate_are_not_trained_on():
    part = part_of(0)
    part.features[part.is_val] = np.nan  # would make every head diverge
    selection = SgdProtocol(epochs=2, batch_size=64).select(part, "accuracy")
    assert len(selection.curve) == len(RATES)


def test_heads_that_diverge_are_not_chosen(monkeypatch):
    part = part_of(0)
    monkeypatch.setattr(probe_sgd, "RATES", (0.05, 1e38))
    selection = SgdProtocol(epochs=3, batch_size=64).select(part, "accuracy")
    assert (selection.chosen, selection.curve[1]["val"]) == (0.05, 0)
    monkeypatch.setattr(probe_sgd, "RATES", (1e38,))
    with pytest.raises(ValueError, match="every learning rate diverged"):
        SgdProtocol(epochs=3, batch_size=64).select(part, "accuracy")


def test_batch_norm_makes_the_scale_of_features_irrelevant():
    logits = []
    for scale in (1.0, 1000.0):
        features, labels = made(0, num_rows=90, scale=scale)
        (head,) = SgdProtocol(batch_norm=True, epochs=40, batch_size=30).fit(
            features, labels, [0.1]
        )
        logits.append(head.logits(features))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2)
