"""A teacher's losses against float64 loops, and the assignments against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from synthrep_trainer import teacher_losses
from synthrep_trainer.teacher_losses import (
    Assignments,
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


def unit(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=1)


ALL = slice(None)


def test_assignments_are_those_of_the_slow_iteration():
    tokens, prototypes = unit(11, 6), unit(5, 6, seed=1)
    shares = torch.exp(tokens.double() @ prototypes.double().T / 0.05)
    for _ in range(3):
        for k in range(5):
            shares[:, k] /= 5 * shares[:, k].sum()
        for row in shares:
            row /= row.sum()
    found = sinkhorn(tokens, prototypes, 0.05).shares(ALL)
    torch.testing.assert_close(found.double(), shares, rtol=1e-4, atol=1e-6)


def test_many_iterations_share_tokens_equally_among_prototypes():
    shares = sinkhorn(unit(60, 5), unit(6, 5, seed=1), 0.07, iterations=200).shares(ALL)
    torch.testing.assert_close(shares.sum(1), torch.ones(60))
    torch.testing.assert_close(shares.sum(0), torch.full((6,), 10.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 3), (0.1, 0)])
def test_impossible_assignments_are_refused(temperature, iterations):
    with pytest.raises(ValueError, match="expected a temperature"):
        sinkhorn(unit(2, 2), unit(2, 2), temperature, iterations)


def test_masked_loss_is_the_mean_cross_entropy():
    tokens, prototypes = unit(7, 4).requires_grad_(), unit(5, 4, seed=1).requires_grad_()
    teacher = sinkhorn(unit(7, 4, seed=2), unit(5, 4, seed=3), 0.07)
    precise = [leaf.detach().double().requires_grad_() for leaf in (tokens, prototypes)]
    loss = masked_token_loss(tokens, prototypes, teacher, 0.1)
    loss.backward()
    expected = F.cross_entropy(precise[0] @ precise[1].T / 0.1, teacher.shares(ALL).double())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, exact in zip((tokens, prototypes), precise, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def masked_step():
    """Value, gradients, most numbers of one tensor in a step of 50 tokens and 20 prototypes."""
    tokens, prototypes = unit(50, 3).requires_grad_(), unit(20, 3, seed=1).requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        teacher = sinkhorn(unit(50, 3, seed=2), unit(20, 3, seed=3), 0.07)
        loss = masked_token_loss(tokens, prototypes, teacher)
        loss.backward()
    return loss.detach(), tokens.grad, prototypes.grad, largest


def test_pieces_of_the_logits_give_the_loss_of_all(monkeypatch):
    *expected, whole = masked_step()
    monkeypatch.setattr(teacher_losses, "PIECE_LOGITS", 7 * 20)
    *found, largest = masked_step()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (whole, largest) == (50 * 20, 50 * 3)  # a piece has fewer numbers than the tokens


def test_masked_loss_of_nothing_is_zero():
    tokens, prototypes = torch.zeros(0, 3).requires_grad_(), unit(5, 3).requires_grad_()
    teacher = Assignments(torch.zeros(0, 3), unit(5, 3), torch.ones(5), 0.05)
    loss = masked_token_loss(tokens, prototypes, teacher)
    loss.backward()
    assert loss == 0
    assert torch.equal(prototypes.grad, torch.zeros(5, 3))


def test_masked_loss_refuses_a_temperature_of_zero():
    teacher = sinkhorn(unit(1, 5), unit(5, 5), 0.05)
    with pytest.raises(ValueError, match="temperature"):
        masked_token_loss(unit(1, 5), unit(5, 5), teacher, 0.0)


def test_even_shares_cost_the_logarithm_of_the_prototypes():
    prototypes = unit(1, 4).expand(8, 4)
    teacher = sinkhorn(unit(3, 4, seed=1), prototypes, 0.05)
    assert masked_token_loss(unit(3, 4), prototypes, teacher).item() == pytest.approx(math.log(8))
