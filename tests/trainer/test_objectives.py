"""Every objective: its loss against the obvious one, its gradients, pieces, ranks and checkpoints.

This file is started twice for the two ranks, against the same steps on one process.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.batches import Batch
from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.learner import Learner, LearnerConfig
from synthrep_trainer.objectives import (
    Features,
    ObjectiveConfig,
    SynclrConfig,
    Targets,
    TextConfig,
)
from synthrep_trainer.parallel import local
from synthrep_trainer.schedules import Rates
from synthrep_trainer.teacher_losses import sinkhorn
from synthrep_trainer.text_tokens import encode_captions

OBJECTIVES = ("stablerep", "stablerep+", "simclr", "clip", "synclr")
PIECEWISE = ("stablerep", "clip", "synclr")  # what two ranks do in pieces too
SHARDED = ("stablerep+", "synclr")  # whose towers in parts are tested
RANKS = 2
EXIT_LIMIT_S = 240
CAPTIONS = 6
IMAGES_PER_CAPTION = 2
CAPTION_NUMBERS = [0, 1, 2, 3, 1, 5]  # one caption comes twice
CPU = torch.device("cpu")
RATES = Rates(lr=1e-3, weight_decay=0.1, ema_decay=0.9)


def config(name, **changes):
    values = {
        "encoder": EncoderConfig(
            model="vit_synthrep_tiny", image_size_px=8, projection_hidden=32, projection_dim=8
        ),
        "objective": ObjectiveConfig(
            name,
            rows_per_caption=IMAGES_PER_CAPTION,
            temperature=0.2,
            text=TextConfig(width=16, layers=2, heads=2, context=12),
            text_dim=8,
            image_weight=0.7,
            text_weight=1.3,
            synclr=SynclrConfig(
                crops_per_image=2, hidden=16, dim=8, patch_hidden=16, bottleneck=8, prototypes=12,
                teacher_warmup_steps=3,
            ),
        ),
        "seed": 3,
        "has_moving_average": name == "synclr",
    }  # fmt: skip
    return LearnerConfig(**(values | changes))


def make_batch(name):
    """The rows of this rank, which has every second caption; all of them on one process."""
    random = torch.Generator().manual_seed(1)
    rows = CAPTIONS * IMAGES_PER_CAPTION
    images = torch.randint(0, 256, (rows, 8, 8, 3), generator=random, dtype=torch.uint8)
    crops = torch.randint(0, 256, (2 * rows, 4, 4, 3), generator=random, dtype=torch.uint8)
    numbers = torch.tensor(CAPTION_NUMBERS)
    ids = torch.arange(rows) // 2 if name == "simclr" else numbers.repeat_interleave(2)
    tokens = encode_captions([f"bird {number}" for number in CAPTION_NUMBERS], 12)
    whole = Batch(
        images,
        ids,
        tokens if name in ("clip", "stablerep+") else None,
        crops if name == "synclr" else None,
    )
    rank, world = distributed.rank(), distributed.world_size()
    return Batch._make(
        None if t is None else t.unflatten(0, (CAPTIONS, -1))[rank::world].flatten(0, 1)
        for t in whole
    )


def make_held_out():
    """Nine images of three captions, of which the first rank has five."""
    random = torch.Generator().manual_seed(4)
    numbers = torch.arange(9) // 3
    colours = torch.randint(0, 200, (3, 1, 1, 3), generator=random)[numbers]
    noise = torch.randint(0, 56, (9, 8, 8, 3), generator=random)
    images = (colours + noise).to(torch.uint8)
    if distributed.world_size() == 1:
        return Batch(images, numbers)
    own = slice(0, 5) if distributed.rank() == 0 else slice(5, 9)
    return Batch(images[own], numbers[own])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# The obvious losses: loops over rows and candidates, in float64.


def slow_loss(anchors, anchor_ids, candidates, candidate_ids, scale, *, skips_own):
    anchors, candidates = (F.normalize(rows, dim=1) for rows in (anchors, candidates))
    losses = []
    for i, anchor in enumerate(anchors):
        others = [j for j in range(len(candidates)) if not (skips_own and i == j)]
        logits = torch.stack([scale * anchor @ candidates[j] for j in others])
        log_q = logits - logits.logsumexp(0)
        matches = [k for k, j in enumerate(others) if candidate_ids[j] == anchor_ids[i]]
        if matches:
            losses.append(-log_q[matches].mean())
    return torch.stack(losses).mean()


def slow_clip(objective, features, ids):
    images = objective.image_projection(features.images)
    texts = objective.text_projection(features.texts)
    scale, text_ids = objective.log_scale.exp(), ids[::IMAGES_PER_CAPTION]
    one = slow_loss(images, ids, texts, text_ids, scale, skips_own=False)
    other = slow_loss(texts, text_ids, images, ids, scale, skips_own=False)
    return (one + other) / 2


def slow_multi_positive(objective, features, ids):
    embeddings = objective.projection(features.images, IMAGES_PER_CAPTION)
    return slow_loss(embeddings, ids, embeddings, ids, 1 / 0.2, skips_own=True)


def slow_synclr(objective, features, ids, targets):
    views, crops = (
        objective.predictor(objective.projector(rows)) for rows in (features.images, features.crops)
    )
    loss = slow_loss(views, ids, targets.embeddings, ids, 1 / 0.2, skips_own=True)
    for crop in range(2):
        rows = crops[crop::2]
        loss = loss + slow_loss(rows, ids, targets.embeddings, ids, 1 / 0.2, skips_own=False) / 2
    unit = F.normalize(objective.patch_head.mlp(features.patches), dim=1)
    logits = unit @ F.normalize(objective.patch_head.prototypes, dim=1).T / 0.1
    shares = targets.assignments.shares(slice(None)).double()
    masked = [
        -(target * (row - row.logsumexp(0))).sum()
        for row, target in zip(logits, shares, strict=True)
    ]
    return loss + torch.stack(masked).mean()


def slow(name, objective, features, ids, targets):
    if name in ("stablerep", "simclr"):
        return slow_multi_positive(objective, features, ids)
    if name == "clip":
        return slow_clip(objective, features, ids)
    if name == "stablerep+":
        return 0.7 * slow_multi_positive(objective, features, ids) + 1.3 * slow_clip(
            objective, features, ids
        )
    return slow_synclr(objective, features, ids, targets)


def draw_features(name):
    random = torch.Generator().manual_seed(2)

    def rows(count, width):
        return torch.randn(count, width, generator=random)

    has_text, is_synclr = name in ("clip", "stablerep+"), name == "synclr"
    features = Features(
        rows(12, 128),
        rows(6, 16) if has_text else None,
        rows(24, 128) if is_synclr else None,
        rows(10, 128) if is_synclr else None,
    )
    if not is_synclr:
        return features, None
    tokens, prototypes = (F.normalize(rows(count, 8), dim=1) for count in (10, 12))
    return features, Targets(rows(12, 8), sinkhorn(tokens, prototypes, 0.1))


def assert_equal_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in found.items():
        difference = (gradient - expected[name]).norm()
        assert difference <= tolerance * (expected[name].norm() + 0.01 * total), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_obvious_way(name):
    objective = Learner(config(name), CPU)._objective
    precise = copy.deepcopy(objective).double()
    features, targets = draw_features(name)
    ids = make_batch(name).caption_ids
    loss = objective(features, ids, targets).loss
    loss.backward()
    features = Features._make(None if t is None else t.double() for t in features)
    if targets is not None:
        targets = targets._replace(embeddings=targets.embeddings.double())
    expected = slow(name, precise, features, ids, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, slow_ones = (
        {name: p.grad.double() for name, p in module.named_parameters()}
        for module in (objective, precise)
    )
    assert_equal_gradients(found, slow_ones)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_reaches_every_parameter(name):
    learner = Learner(config(name), CPU)
    learner.step(make_batch(name), step=1, rates=RATES)
    for parameter, p in learner._model.named_parameters():
        assert p.grad is not None, parameter
        # The mask token is zero at first, but not its gradient; keys' biases have none.
        is_key_bias = parameter.endswith(("qkv.bias", "in_proj_bias"))
        assert is_key_bias or p.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss(name):
    learner, batch = Learner(config(name), CPU), make_batch(name)
    losses = [learner.step(batch, step=step, rates=RATES).loss for step in range(1, 16)]
    assert losses[-1] < losses[0] - 0.2


def gradients(learner, batch):
    result = learner.step(batch, step=1, rates=RATES)
    return result.loss, {n: p.grad.clone() for n, p in learner._model.named_parameters()}


@pytest.mark.parametrize("micro_batch_images", [2, 5, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_pieces_give_the_gradients_of_the_whole_batch(name, micro_batch_images):
    batch = make_batch(name)
    loss, expected = gradients(Learner(config(name), CPU), batch)
    pieces = config(name, micro_batch_images=micro_batch_images)
    piecewise, found = gradients(Learner(pieces, CPU), batch)
    assert piecewise == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("name", ["stablerep", "synclr"])
def test_pieces_repeat_their_stochastic_depth(name):
    """One pass with graph over the same pieces is the reference: whole batches draw otherwise."""
    encoder = replace(config(name).encoder, drop_path_rate=0.5)
    learner = Learner(config(name, encoder=encoder, micro_batch_images=4), CPU)
    reference = copy.deepcopy(learner)
    batch = make_batch(name)
    _, found = gradients(learner, batch)
    inputs, ids = reference._inputs(batch, 1)
    pieces = list(inputs.split(CAPTIONS, 2))
    targets = reference._targets(pieces, 1)
    outputs = []
    for number, piece in enumerate(pieces):
        with reference._pass(1, 0, number):
            outputs.append(reference._towers(piece))
    whole = Features._make(
        None if rows[0] is None else torch.cat(rows) for rows in zip(*outputs, strict=True)
    )
    reference._objective(whole, ids, targets).loss.backward()
    expected = {n: p.grad for n, p in reference._model.named_parameters()}
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loaded_learner_goes_on_bit_equal(name):
    encoder = replace(config(name).encoder, drop_path_rate=0.3)
    settings = config(name, encoder=encoder, has_moving_average=True)
    learner, batch = Learner(settings, CPU), make_batch(name)
    for step in (1, 2):
        learner.step(batch, step=step, rates=RATES)
    other = Learner(settings, CPU)
    saved = {p: {n: t.clone() for n, t in found.items()} for p, found in learner.parts().items()}
    other.load(saved)
    torch.randn(7)  # the global generator has no part in a step
    for step in (3, 4):
        results = [one.step(batch, step=step, rates=RATES) for one in (learner, other)]
        assert results[0] == results[1]
    for part, found in learner.parts().items():
        for tensor, value in found.items():
            assert torch.equal(value, other.parts()[part][tensor]), (part, tensor)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_learns_nearly_the_same(name):
    batch = make_batch(name)
    loss, expected = gradients(Learner(config(name), CPU), batch)
    limit = 4 if name in ("clip", "synclr") else None
    half = config(name, precision="bf16", micro_batch_images=limit)
    rough, found = gradients(Learner(half, CPU), batch)
    assert rough == pytest.approx(loss, rel=0.05)
    assert rough != loss
    assert {g.dtype for g in found.values()} == {torch.float32}
    one, two = (torch.cat([g.flatten() for g in grads.values()]) for grads in (found, expected))
    assert F.cosine_similarity(one, two, dim=0) > 0.95


def test_stochastic_depth_is_drawn_anew_at_each_step():
    encoder = replace(config("clip").encoder, drop_path_rate=0.5)
    learner, batch = Learner(config("clip", encoder=encoder), CPU), make_batch("clip")
    still = Rates(lr=0.0)
    losses = [learner.step(batch, step=step, rates=still).loss for step in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]


def test_the_logit_scale_stays_below_100():
    learner = Learner(config("clip"), CPU)
    with torch.no_grad():
        learner._objective.log_scale.fill_(4.6)
    for step in range(1, 4):
        learner.step(make_batch("clip"), step=step, rates=RATES._replace(lr=0.5))
        assert 0 <= learner._objective.log_scale.item() <= 4.6053


def test_the_teacher_gets_no_gradient_and_follows_the_student():
    learner = Learner(config("synclr"), CPU)
    before = {n: t.clone() for n, t in learner.parts()["ema_heads"].items()}
    assert {n.split(".")[1] for n in before} == {"projector", "patch_head"}
    learner.step(make_batch("synclr"), step=1, rates=RATES)
    assert all(p.grad is None for p in learner._average.module.parameters())
    assert any(not torch.equal(t, before[n]) for n, t in learner.parts()["ema_heads"].items())


def test_synclr_without_a_moving_average_is_refused():
    with pytest.raises(ValueError, match="it is the teacher"):
        Learner(config("synclr", has_moving_average=False), CPU)


def test_half_of_the_images_have_half_of_their_patches_masked():
    learner = Learner(config("synclr"), CPU)
    inputs, _ = learner._inputs(make_batch("synclr"), 1)
    assert sorted(inputs.masks.sum(1).tolist()) == [0] * 6 + [2] * 6  # of 4 patches
    again, _ = learner._inputs(make_batch("synclr"), 1)
    other, _ = learner._inputs(make_batch("synclr"), 2)
    assert torch.equal(inputs.masks, again.masks)
    assert not torch.equal(inputs.masks, other.masks)


def test_the_patch_head_tells_patches_apart_from_the_start():
    """Biases and wide weights would point all of them the same way: a mean cosine of 0.3."""
    head = Learner(config("synclr", objective=ObjectiveConfig("synclr", 2)), CPU)._objective
    patches = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    tokens, _ = head.patch_head(patches)
    cosines = tokens @ tokens.T
    assert (cosines.sum() - 300) / (300 * 299) < 0.1


def test_the_student_does_not_see_what_is_masked():
    learner = Learner(config("synclr"), CPU)
    inputs, _ = learner._inputs(make_batch("synclr"), 1)
    row = int(inputs.masks.sum(1).argmax())
    pixels = inputs.masks[row].view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
    changed = inputs.images.clone()
    changed[row][pixels] = 255 - changed[row][pixels]
    one, two = (learner._towers(inputs._replace(images=i)).images for i in (inputs.images, changed))
    assert torch.equal(one, two)
    seen = [learner._teacher(inputs._replace(images=i)).images for i in (inputs.images, changed)]
    assert not torch.equal(seen[0][row], seen[1][row])


# Two ranks.


def everything():
    """Loss and gradients of every objective, whole and in pieces."""
    found = {}
    for name in OBJECTIVES:
        for limit in (None, 2) if name in PIECEWISE else (None,):
            learner = Learner(config(name, micro_batch_images=limit), CPU)
            loss, grads = gradients(learner, make_batch(name))
            norms = {parameter: g.norm().item() for parameter, g in grads.items()}
            sample = {n: g.flatten()[:20].tolist() for n, g in grads.items()}
            losses = [loss]
            losses.append(learner.step(make_batch(name), step=2, rates=RATES).loss)
            held_out = make_held_out()
            found["neighbours"] = learner.neighbour_accuracy(held_out)
            found[f"{name} {limit}"] = {"losses": losses, "norms": norms, "sample": sample}
    return found


def sharded():
    """Losses of learners whose towers are in parts, before and after a checkpoint."""
    found = {}
    for name in SHARDED:
        settings = config(name, has_moving_average=True, max_grad_norm=0.5)
        settings = replace(settings, micro_batch_images=2 if name == "synclr" else None)
        learner = Learner(settings, CPU, layout="shard")
        batch = make_batch(name)
        before = [learner.step(batch, step=step, rates=RATES)[:3] for step in (1, 2)]
        saved = {
            p: {n: t.clone() for n, t in parts.items()} for p, parts in learner.parts().items()
        }
        assert not any(isinstance(t, DTensor) for parts in saved.values() for t in parts.values())
        others = [Learner(settings, CPU, layout=layout) for layout in ("shard", "replicate")]
        for other in others:
            other.load(saved)
        after = [one.step(batch, step=3, rates=RATES)[:3] for one in (learner, *others)]
        found[name] = {
            "before": before,
            "after": after,
            "neighbours": learner.neighbour_accuracy(make_held_out()),
            "sizes": {p: sum(t.numel() for t in parts.values()) for p, parts in saved.items()},
            "local": sum(local(p).numel() for p in learner._towers.parameters()),
        }
    return found


def main(folder):
    torch.set_num_threads(1)
    with distributed.process_group(timeout_s=200):
        Path(folder, f"{distributed.rank()}.json").write_text(
            json.dumps(everything() | {"sharded": sharded()})
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank of one two-process run."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ExitStack() as stack:
        processes = []
        for rank in range(RANKS):
            environment = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
                "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            }  # fmt: skip
            command = [sys.executable, __file__, str(folder)]
            process = subprocess.Popen(
                command, env=os.environ | environment, stderr=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            error = process.communicate(timeout=EXIT_LIMIT_S)[1]
            assert process.returncode == 0, error
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return everything() | {"sharded": sharded()}


@pytest.mark.parametrize(
    ("name", "limit"), [(n, None) for n in OBJECTIVES] + [(n, 2) for n in PIECEWISE]
)
def test_two_ranks_learn_what_one_does(ranks, alone, name, limit):
    expected = alone[f"{name} {limit}"]
    total = sum(norm**2 for norm in expected["norms"].values()) ** 0.5
    for rank in ranks:
        found = rank[f"{name} {limit}"]
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)
        # Adam's first updates turn rounding of the smallest gradients into whole steps.
        assert found["losses"] == pytest.approx(expected["losses"], rel=0.01)
        for parameter, norm in expected["norms"].items():
            tolerance = 1e-4 * (norm + 0.01 * total)
            assert found["norms"][parameter] == pytest.approx(norm, abs=tolerance), parameter
            assert found["sample"][parameter] == pytest.approx(
                expected["sample"][parameter], abs=tolerance
            ), parameter


def test_ranks_share_the_held_out_images(ranks, alone):
    assert [rank["neighbours"] for rank in ranks] == [alone["neighbours"]] * RANKS
    assert alone["neighbours"] > 0.5


@pytest.mark.parametrize("name", SHARDED)
def test_towers_in_parts_learn_what_whole_ones_do(ranks, alone, name):
    """Loss, rate and norm of each step, the norm before it is clipped."""
    expected = alone["sharded"][name]
    for rank in ranks:
        found = rank["sharded"][name]
        assert found["before"][0] == pytest.approx(expected["before"][0], rel=1e-4)
        assert found["before"][1] == pytest.approx(expected["before"][1], rel=0.02)
        assert found["after"][0] == found["after"][1]
        assert found["after"][2] == pytest.approx(found["after"][0], rel=1e-4)
        assert found["neighbours"] == expected["neighbours"]
        assert found["sizes"] == expected["sizes"]
        assert found["local"] < 0.52 * expected["local"]


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.end_process()
