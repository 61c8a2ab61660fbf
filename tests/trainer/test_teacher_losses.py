"""A teacher's losses against float64 loops, and the assignments against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from synthrep_trainer.teacher_losses import (
    masked_token_loss,
    sinkhorn,
    teacher_contrastive_loss,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_contrast(anchors, anchor_ids, teacher, teacher_ids, temperature, *, is_same_image):
    anchors = F.normalize(anchors.double(), dim=1)
    teacher = F.normalize(teacher.double(), dim=1)
    losses = []
    for i in range(len(anchors)):
        others = [j for j in range(len(teacher)) if not (is_same_image and i == j)]
        log_q = torch.log_softmax(anchors[i] @ teacher[others].T / temperature, dim=0)
        positives = [log_q[k] for k, j in enumerate(others) if teacher_ids[j] == anchor_ids[i]]
        if positives:
            losses.append(-sum(positives) / len(positives))
    return sum(losses) / max(1, len(losses))


@pytest.mark.parametrize("temperature", [0.01, 0.08, 1.0])
@pytest.mark.parametrize("is_same_image", [True, False])
@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 2, 2, 2], [5, 5, 5], [0, 1, 1, 3]])
def test_value_and_gradient_equal_the_reference(ids, is_same_image, temperature):
    ids = torch.tensor(ids)
    teacher = draw(len(ids), 6).requires_grad_()
    anchor_ids = ids if is_same_image else ids.repeat_interleave(3)
    anchors = draw(len(anchor_ids), 6, seed=1)
    leaf, precise = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    loss = teacher_contrastive_loss(
        leaf, anchor_ids, teacher, ids, temperature, is_same_image=is_same_image
    )
    loss.backward()
    expected = slow_contrast(
        precise, anchor_ids, teacher.detach(), ids, temperature, is_same_image=is_same_image
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (leaf.grad - precise.grad).norm() <= 1e-4 * precise.grad.norm()
    assert teacher.grad is None


def test_one_image_that_would_meet_only_itself_gives_zero():
    anchor = draw(1, 4).requires_grad_()
    loss = teacher_contrastive_loss(
        anchor, torch.tensor([3]), draw(1, 4), torch.tensor([3]), is_same_image=True
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(anchor.grad, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"anchor_ids": torch.arange(3)}, "need an id each"),
        ({"teacher_ids": torch.arange(3)}, "need an id each"),
        ({"anchors": draw(6, 4), "anchor_ids": torch.arange(6)}, "not of"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "anchors": draw(4, 4), "anchor_ids": torch.arange(4), "teacher_embeddings": draw(4, 4),
        "teacher_ids": torch.arange(4), "is_same_image": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        teacher_contrastive_loss(**(arguments | change))


def test_assignments_are_those_of_the_slow_iteration():
    logits = torch.tanh(draw(11, 5))
    shares = torch.exp(logits.double() / 0.05)
    for _ in range(3):
        for k in range(5):
            shares[:, k] /= 5 * shares[:, k].sum()
        for row in shares:
            row /= row.sum()
    torch.testing.assert_close(sinkhorn(logits, 0.05).double(), shares, rtol=1e-4, atol=1e-6)


def test_many_iterations_share_tokens_equally_among_prototypes():
    shares = sinkhorn(torch.tanh(draw(60, 6)), 0.07, iterations=200)
    torch.testing.assert_close(shares.sum(1), torch.ones(60))
    torch.testing.assert_close(shares.sum(0), torch.full((6,), 10.0), rtol=1e-3, atol=0)


def test_no_tokens_get_no_assignments():
    assert sinkhorn(torch.zeros(0, 5), 0.05).shape == (0, 5)


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 3), (0.1, 0)])
def test_impossible_assignments_are_refused(temperature, iterations):
    with pytest.raises(ValueError, match="expected a temperature"):
        sinkhorn(torch.zeros(2, 2), temperature, iterations)


def test_masked_loss_is_the_mean_cross_entropy():
    logits, targets = draw(7, 5).requires_grad_(), torch.softmax(draw(7, 5, seed=1), dim=1)
    precise = logits.detach().double().requires_grad_()
    loss = masked_token_loss(logits, targets, 0.1)
    loss.backward()
    expected = F.cross_entropy(precise / 0.1, targets.double())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), precise.grad, rtol=1e-4, atol=1e-7)


def test_masked_loss_of_nothing_is_zero():
    assert masked_token_loss(torch.zeros(0, 5), torch.zeros(0, 5)) == 0


def test_masked_loss_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature"):
        masked_token_loss(torch.zeros(1, 5), torch.zeros(1, 5), 0.0)


def test_uniform_shares_cost_the_logarithm_of_the_prototypes():
    loss = masked_token_loss(torch.zeros(3, 8), torch.full((3, 8), 1 / 8))
    assert loss.item() == pytest.approx(math.log(8))
