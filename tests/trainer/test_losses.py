"""Losses against a float64 reference that holds the whole matrix of pairs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from synthrep_trainer import log_sum_exp
from synthrep_trainer.losses import clip_loss, multi_positive_contrastive_loss

GROUPS = {
    "equal groups": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "unequal groups": [4, 4, 4, 4, 4, 9, 9, 7, 7, 7],
    "repeated captions": [5, 5, 8, 8, 5, 5, 8, 8, 1, 1],
    "single images": [0, 0, 1, 2, 2, 3, 4],
    "three rows": [3, 8, 3],
    "one caption": [6] * 9,
    "odd size": [0, 1, 0, 2, 1, 0, 2, 3, 3, 2, 1, 0, 0],
    "two crops": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "negative and huge ids": [-1, 2**62, -1, 2**62, 2**62, 17],
}


def reference(embeddings, caption_ids, temperature):
    """Value and gradient in float64 from the whole matrix, as written in the paper."""
    leaf = embeddings.detach().double().requires_grad_()
    unit = leaf / leaf.norm(dim=1, keepdim=True)
    is_self = torch.eye(len(leaf), dtype=torch.bool)
    logits = (unit @ unit.T / temperature).masked_fill(is_self, -torch.inf)
    positives = (caption_ids[:, None] == caption_ids[None, :]) & ~is_self
    rows = positives.any(1)
    log_q = F.log_softmax(logits[rows], dim=1).masked_fill(~positives[rows], 0)
    value = (-log_q.sum(1) / positives[rows].sum(1)).sum() / max(rows.sum(), 1)
    value.backward()
    return value.detach(), leaf.grad


def draw(num_rows, dim=24, seed=0, spread=1.0):
    """Rows around one direction; the smaller the spread, the more alike."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dim, generator=generator)
    return 3 * (centre + spread * torch.randn(num_rows, dim, generator=generator))


def value_and_gradient(embeddings, caption_ids, temperature):
    leaf = embeddings.clone().requires_grad_()
    value = multi_positive_contrastive_loss(leaf, caption_ids, temperature)
    value.backward()
    return value.detach(), leaf.grad


def assert_matches(embeddings, caption_ids, temperature, *, tolerance=1e-5):
    value, gradient = value_and_gradient(embeddings, caption_ids, temperature)
    expected, expected_gradient = reference(embeddings, caption_ids, temperature)
    assert abs(value - expected) <= tolerance * max(1, abs(expected))
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("name", GROUPS)
def test_value_and_gradient_equal_the_reference(name, temperature):
    caption_ids = torch.tensor(GROUPS[name])
    assert_matches(draw(len(caption_ids)), caption_ids, temperature)


@pytest.mark.parametrize("name", ["equal groups", "unequal groups", "one caption"])
def test_lowest_temperatures_equal_the_reference(name):
    caption_ids = torch.tensor(GROUPS[name])
    assert_matches(draw(len(caption_ids)), caption_ids, 0.005)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.005])
@pytest.mark.parametrize("num_rows", [511, 513, 1031])
def test_many_rows_across_tiles_equal_the_reference(num_rows, temperature):
    generator = torch.Generator().manual_seed(num_rows)
    caption_ids = torch.randint(0, num_rows // 4, (num_rows,), generator=generator)
    assert_matches(draw(num_rows, dim=33, spread=2.0), caption_ids, temperature)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_nearly_equal_embeddings_keep_their_precision(temperature):
    assert_matches(draw(60, spread=0.05), torch.arange(60) % 15, temperature, tolerance=1e-4)


@pytest.mark.parametrize("temperature", [0.02, 0.005])
def test_opposite_embeddings_stay_finite_at_low_temperature(temperature):
    axis = torch.eye(1, 8)
    embeddings = torch.cat([axis, -axis, axis, -axis]) + 0.01 * draw(4, dim=8)
    assert_matches(embeddings, torch.tensor([0, 0, 1, 1]), temperature)


@pytest.mark.parametrize("tile_rows", [1, 3, 64])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_result_does_not_depend_on_the_tile(monkeypatch, tile_rows, temperature):
    monkeypatch.setattr(log_sum_exp, "TILE_ROWS", tile_rows)
    assert_matches(draw(10), torch.tensor(GROUPS["repeated captions"]), temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_the_reference_is_met_without_onednn_too(monkeypatch, temperature):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    embeddings, caption_ids = draw(700, dim=40, spread=2.0), torch.arange(700) % 99
    assert_matches(embeddings, caption_ids, temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_a_second_backward_gives_the_same_gradient(temperature):
    leaf = draw(20).requires_grad_()
    loss = multi_positive_contrastive_loss(leaf, torch.arange(20) % 7, temperature)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_a_gradient_of_the_gradient_is_refused(temperature):
    leaf = draw(20).requires_grad_()
    loss = multi_positive_contrastive_loss(leaf, torch.arange(20) % 7, temperature)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_equal_captions_attract_wherever_they_stand():
    """Rows 0 and 3 share a caption; a mask by position would push them apart."""
    embeddings = draw(6)
    _, gradient = value_and_gradient(embeddings, torch.tensor([5, 1, 1, 5, 2, 2]), 0.1)
    towards_positive = F.normalize(embeddings, dim=1)[3]
    assert gradient[0] @ towards_positive < 0
    _, gradient = value_and_gradient(embeddings, torch.tensor([5, 1, 1, 6, 2, 2]), 0.1)
    assert gradient[3] @ F.normalize(embeddings, dim=1)[0] > 0


def test_identical_positives_and_far_negatives_give_the_entropy_of_the_positives():
    embeddings = torch.eye(3, 8).repeat_interleave(4, dim=0)
    caption_ids = torch.arange(3).repeat_interleave(4)
    loss = multi_positive_contrastive_loss(embeddings, caption_ids, 0.02)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5)


def test_loss_ignores_self_similarity():
    """All similarities are equal, so the loss is the logarithm of the number of candidates."""
    loss = multi_positive_contrastive_loss(torch.ones(7, 5), torch.zeros(7, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(6), abs=1e-5)


def test_rows_without_positive_are_candidates_but_not_averaged():
    embeddings, caption_ids = draw(5), torch.tensor([0, 0, 1, 2, 3])
    loss = multi_positive_contrastive_loss(embeddings, caption_ids)
    pair = multi_positive_contrastive_loss(embeddings[:2], caption_ids[:2])
    assert loss > pair + 0.1
    assert loss.item() == pytest.approx(reference(embeddings, caption_ids, 0.1)[0].item(), abs=1e-5)


@pytest.mark.parametrize("caption_ids", [[], [3], [3, 4], [3, 3], list(range(9))])
def test_batches_that_say_nothing_give_exactly_zero(caption_ids):
    """No positive anywhere, or one candidate that is the positive."""
    value, gradient = value_and_gradient(
        draw(len(caption_ids)), torch.tensor(caption_ids, dtype=torch.int64), 0.1
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_fp32(dtype):
    caption_ids = torch.arange(12) % 4
    embeddings = draw(12).to(dtype)
    value, gradient = value_and_gradient(embeddings, caption_ids, 0.1)
    expected, expected_gradient = value_and_gradient(embeddings.float(), caption_ids, 0.1)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value == expected
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_autocast_changes_neither_value_nor_gradient(temperature):
    embeddings, caption_ids = draw(20), torch.arange(20) % 7
    plain = value_and_gradient(embeddings, caption_ids, temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = value_and_gradient(embeddings, caption_ids, temperature)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


def test_autocast_leaves_the_clip_loss_alone():
    ids = {"image_caption_ids": torch.arange(9) % 3, "text_caption_ids": torch.arange(3)}
    plain = clip_loss(draw(9), draw(3, seed=1), logit_scale=14.0, **ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(draw(9), draw(3, seed=1), logit_scale=14.0, **ids), plain)


def test_result_follows_a_permutation_of_the_rows():
    embeddings, caption_ids = draw(30), torch.arange(30) % 8
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    value, gradient = value_and_gradient(embeddings, caption_ids, 0.1)
    permuted, permuted_gradient = value_and_gradient(embeddings[order], caption_ids[order], 0.1)
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(permuted_gradient, gradient[order])


def test_non_finite_embeddings_show_in_the_loss():
    embeddings = draw(6)
    embeddings[2, 1] = torch.nan
    assert multi_positive_contrastive_loss(embeddings, torch.arange(6) % 3).isnan()


def test_no_square_matrix_is_held(monkeypatch):
    """The largest tensor of a step is a tile, never rows x rows."""
    monkeypatch.setattr(log_sum_exp, "TILE_ROWS", 32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        value_and_gradient(draw(256, dim=4), torch.arange(256) % 64, 0.1)
        value_and_gradient(draw(256, dim=4), torch.arange(256) % 64, 0.005)
    assert largest == 32 * 32


_PEAK_OF_A_STEP = """
import torch
from synthrep_trainer.losses import multi_positive_contrastive_loss

def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

def step(rows):
    caption_ids = torch.arange(len(rows)) // 8
    multi_positive_contrastive_loss(rows.requires_grad_(), caption_ids).backward()

step(torch.randn(64, 256))
rows = torch.randn(16_384, 256)
before = kilobytes("VmRSS")
step(rows)
assert kilobytes("VmHWM") - before < 1_000_000
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_sixteen_thousand_rows_need_less_than_a_gigabyte():
    subprocess.run([sys.executable, "-c", _PEAK_OF_A_STEP], check=True)


@pytest.mark.parametrize(
    ("embeddings", "caption_ids", "temperature", "message"),
    [
        (torch.ones(4), torch.zeros(4, dtype=torch.int64), 0.1, "expected embeddings"),
        (torch.ones(4, 2), torch.zeros(3, dtype=torch.int64), 0.1, "expected embeddings"),
        (torch.ones(4, 2), torch.zeros(4), 0.1, "integers"),
        (torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 0.1, "float"),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 0.0, "temperature"),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), math.nan, "temperature"),
    ],
)
def test_bad_arguments_are_refused(embeddings, caption_ids, temperature, message):
    with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
        multi_positive_contrastive_loss(embeddings, caption_ids, temperature)


def clip_reference(images, texts, image_ids, text_ids, log_scale):
    """Both directions in float64 with a dense soft-label matrix."""
    leaves = [t.detach().double().requires_grad_() for t in (images, texts, log_scale)]
    unit_images, unit_texts = (leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves[:2])
    logits = leaves[2].exp() * unit_images @ unit_texts.T
    matches = (image_ids[:, None] == text_ids[None, :]).double()
    total = 0
    for direction, positives in ((logits, matches), (logits.T, matches.T)):
        rows = positives.sum(1) > 0
        targets = positives[rows] / positives[rows].sum(1, keepdim=True)
        per_row = -(targets * F.log_softmax(direction[rows], dim=1)).sum(1)
        total = total + (per_row.mean() / 2 if rows.any() else 0)
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(
    ("image_ids", "text_ids"),
    [
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2]),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ([0, 1, 1, 3, 4], [1, 0, 1, 3, 4]),
        ([0, 0, 7, 2], [2, 0, 9]),
    ],
    ids=["groups", "pairs", "repeated captions", "some without positive"],
)
def test_clip_loss_equals_the_reference(image_ids, text_ids, scale):
    images, texts = draw(len(image_ids), seed=1), draw(len(text_ids), seed=2)
    log_scale = torch.tensor(scale).log()
    image_ids, text_ids = torch.tensor(image_ids), torch.tensor(text_ids)
    leaves = [t.clone().requires_grad_() for t in (images, texts, log_scale)]
    loss = clip_loss(
        leaves[0],
        leaves[1],
        image_caption_ids=image_ids,
        text_caption_ids=text_ids,
        logit_scale=leaves[2].exp(),
    )
    loss.backward()
    expected, gradients = clip_reference(images, texts, image_ids, text_ids, log_scale)
    assert abs(loss - expected) <= 1e-5 * max(1, abs(expected))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (leaf.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_clip_loss_without_any_match_is_zero():
    images = draw(3).requires_grad_()
    loss = clip_loss(
        images,
        draw(2),
        image_caption_ids=torch.arange(3),
        text_caption_ids=torch.tensor([7, 8]),
        logit_scale=10.0,
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(images.grad, torch.zeros_like(images))
