"""One update: what it changes, and what stops it before it changes anything."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from synthrep_trainer.augment import normalise
from synthrep_trainer.batches import Batch
from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.errors import CollapseError, NonFiniteLossError
from synthrep_trainer.learner import Learner, LearnerConfig
from synthrep_trainer.losses import multi_positive_contrastive_loss
from synthrep_trainer.objectives import ObjectiveConfig
from synthrep_trainer.representation import effective_rank
from synthrep_trainer.schedules import Rates

CONFIG = LearnerConfig(
    encoder=EncoderConfig(
        model="vit_synthrep_tiny", image_size_px=8, projection_hidden=32, projection_dim=8
    ),
    objective=ObjectiveConfig("stablerep", rows_per_caption=2, temperature=0.2),
    seed=3,
)
RATES = Rates(lr=0.01, weight_decay=0.1)
STILL = Rates(lr=0.0)


@pytest.fixture
def learner():
    torch.set_num_threads(1)
    return Learner(CONFIG, torch.device("cpu"))


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 8, 8, 3), generator=random, dtype=torch.uint8)
    return Batch(images, torch.arange(6).repeat_interleave(2))


def tensors(learner):
    return {
        f"{part}.{name}": tensor.clone()
        for part, found in learner.parts().items()
        for name, tensor in found.items()
    }


def test_an_update_is_that_of_the_obvious_way(learner, batch):
    other = Learner(CONFIG, torch.device("cpu"))._model
    encoder, head = other["towers"].encoder, other["objective"].projection
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in other.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    features = encoder(normalise(batch.images))
    loss = multi_positive_contrastive_loss(head(features, 2), batch.caption_ids, 0.2)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in other.parameters()]).double().norm()
    optimizer.step()
    result = learner.step(batch, step=1, rates=RATES)
    assert result.loss == pytest.approx(loss.item())
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.health.effective_rank == pytest.approx(effective_rank(features))
    for one, two in zip(learner._model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_loaded_learner_goes_on_bit_equal(learner, batch):
    for step in (1, 2):
        learner.step(batch, step=step, rates=RATES)
    other = Learner(CONFIG, torch.device("cpu"))
    other.load({part: dict(found) for part, found in learner.parts().items()})
    for step in (3, 4):
        results = [one.step(batch, step=step, rates=RATES) for one in (learner, other)]
        assert results[0] == results[1]
    assert tensors(learner).keys() == tensors(other).keys()
    for name, tensor in tensors(learner).items():
        assert torch.equal(tensor, tensors(other)[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing(learner, batch, value):
    learner.step(batch, step=1, rates=RATES)
    with torch.no_grad():
        learner._objective.projection.linears[2].bias.fill_(value)
    before = tensors(learner)
    with pytest.raises(NonFiniteLossError, match="loss is nan .* at step 2"):
        learner.step(batch, step=2, rates=RATES)
    for name, tensor in tensors(learner).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_no_number_stops_too(learner, batch):
    learner.step(batch, step=1, rates=RATES)
    parameter = learner._objective.projection.linears[0].weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    with pytest.raises(NonFiniteLossError, match="its gradient (nan|inf)"):
        learner.step(batch, step=2, rates=RATES)
    assert torch.equal(parameter, before)


def test_a_collapsed_representation_stops_the_run(learner, batch):
    with torch.no_grad():
        learner._objective.projection.linears[2].weight.zero_()
    assert learner.step(batch, step=9, rates=STILL).health is None
    with pytest.raises(CollapseError, match="step 10"):
        learner.step(batch, step=10, rates=STILL)


def test_an_untrained_representation_is_no_collapse(batch):
    for seed in range(5):
        untrained = Learner(replace(CONFIG, seed=seed), torch.device("cpu"))
        assert untrained.step(batch, step=1, rates=STILL).health.effective_rank > 1


def test_the_moving_average_follows_the_weights(batch):
    learner = Learner(replace(CONFIG, has_moving_average=True), torch.device("cpu"))
    expected = {n: t.clone() for n, t in learner.parts()["encoder"].items()}
    for step, decay in ((1, 0.5), (2, 0.9), (3, 1.0)):
        learner.step(batch, step=step, rates=RATES._replace(ema_decay=decay))
        for name, tensor in learner.parts()["encoder"].items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in learner.parts()["ema_encoder"].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
    images = normalise(batch.images)
    assert not torch.allclose(learner.best_encoder(images), learner._towers.encoder(images))


def test_without_an_average_the_best_encoder_is_the_trained_one(learner):
    assert learner.best_encoder is learner._towers.encoder
    assert "ema_encoder" not in learner.parts()


def test_a_gradient_above_the_bound_is_scaled_down_to_it(batch):
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    plain = Learner(CONFIG, torch.device("cpu"))
    norm = plain.step(batch, step=1, rates=RATES).gradient_norm
    moments = {}
    for bound in (norm / 4, norm * 4):
        clipped = Learner(replace(CONFIG, max_grad_norm=bound), torch.device("cpu"))
        assert clipped.step(batch, step=1, rates=RATES).gradient_norm == norm
        optimizer = clipped.parts()["optimizer"]
        moments[bound] = torch.cat(
            [t.flatten() for n, t in optimizer.items() if n.startswith("exp_avg.")]
        )
    assert (10 * moments[norm / 4]).norm().item() == pytest.approx(norm / 4, rel=1e-4)
    assert (10 * moments[norm * 4]).norm().item() == pytest.approx(norm, rel=1e-4)


def poisoned(learner, steps):
    """Makes the gradient of these steps no number."""
    calls = 0

    def hook(gradient):
        nonlocal calls
        calls += 1
        return gradient * torch.nan if calls in steps else gradient

    learner._objective.projection.linears[0].weight.register_hook(hook)
    return learner


def test_skipped_steps_change_nothing_and_are_counted_in_a_row(batch):
    config = replace(CONFIG, max_skipped_steps=2, has_moving_average=True)
    rates = RATES._replace(ema_decay=0.5)
    learner = poisoned(Learner(config, torch.device("cpu")), {2, 3, 5, 6, 7})
    results = [learner.step(batch, step=1, rates=rates)]
    before = tensors(learner)
    results += [learner.step(batch, step=step, rates=rates) for step in (2, 3)]
    after = tensors(learner)
    assert after.pop("progress.skipped_in_a_row") == 2
    before.pop("progress.skipped_in_a_row")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    results += [learner.step(batch, step=step, rates=rates) for step in (4, 5, 6)]
    assert [result.is_skipped for result in results] == [False, True, True, False, True, True]
    with pytest.raises(NonFiniteLossError, match="at step 7, after 2 skipped steps in a row"):
        learner.step(batch, step=7, rates=rates)


def test_the_count_of_skipped_steps_survives_a_checkpoint(batch):
    config = replace(CONFIG, max_skipped_steps=2)
    learner = poisoned(Learner(config, torch.device("cpu")), {1, 2})
    for step in (1, 2):
        learner.step(batch, step=step, rates=RATES)
    other = poisoned(Learner(config, torch.device("cpu")), {1})
    other.load({part: dict(found) for part, found in learner.parts().items()})
    with pytest.raises(NonFiniteLossError, match="after 2 skipped"):
        other.step(batch, step=3, rates=RATES)


def test_weight_decay_follows_its_rate_on_matrices_alone(batch):
    learner = Learner(CONFIG, torch.device("cpu"))
    learner.step(batch, step=1, rates=Rates(lr=0.01, weight_decay=0.3))
    assert [group["weight_decay"] for group in learner._optimizer.param_groups] == [0.3, 0.0] * 2


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_learn_what_plain_ones_do(batch):
    results = []
    for is_compiled in (False, True):
        learner = Learner(CONFIG, torch.device("cpu"), is_compiled=is_compiled)
        results.append([learner.step(batch, step=step, rates=RATES).loss for step in (1, 2)])
    assert results[1] == pytest.approx(results[0], rel=1e-3)
    assert all("_orig_mod" not in name for name in learner.parts()["encoder"])
