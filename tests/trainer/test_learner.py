"""One update: what it changes, and what stops it before it changes anything."""

from __future__ import annotations

import pytest
import torch

from synthrep_trainer.augment import normalise
from synthrep_trainer.batches import Batch
from synthrep_trainer.encoder import EncoderConfig
from synthrep_trainer.errors import CollapseError, NonFiniteLossError
from synthrep_trainer.learner import Learner, LearnerConfig
from synthrep_trainer.losses import multi_positive_contrastive_loss
from synthrep_trainer.representation import effective_rank

CONFIG = LearnerConfig(
    encoder=EncoderConfig(
        model="vit_synthrep_tiny", image_size_px=8, projection_hidden=32, projection_dim=8
    ),
    seed=3,
    temperature=0.2,
    weight_decay=0.1,
    rows_per_caption=2,
)


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
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in other.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    features = other.encoder(normalise(batch.images))
    loss = multi_positive_contrastive_loss(other.head(features, 2), batch.caption_ids, 0.2)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in other.parameters()]).double().norm()
    optimizer.step()
    result = learner.step(batch, step=1, lr=0.01)
    assert result.loss == pytest.approx(loss.item())
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.effective_rank == pytest.approx(effective_rank(features))
    for one, two in zip(learner._model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_loaded_learner_goes_on_bit_equal(learner, batch):
    for step in (1, 2):
        learner.step(batch, step=step, lr=0.01)
    other = Learner(CONFIG, torch.device("cpu"))
    other.load({part: dict(found) for part, found in learner.parts().items()})
    for step in (3, 4):
        assert learner.step(batch, step=step, lr=0.01) == other.step(batch, step=step, lr=0.01)
    assert tensors(learner).keys() == tensors(other).keys()
    for name, tensor in tensors(learner).items():
        assert torch.equal(tensor, tensors(other)[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing(learner, batch, value):
    learner.step(batch, step=1, lr=0.01)
    with torch.no_grad():
        learner._model.head.linears[2].bias.fill_(value)
    before = tensors(learner)
    with pytest.raises(NonFiniteLossError, match="loss is nan .* at step 2"):
        learner.step(batch, step=2, lr=0.01)
    changed = [n for n, t in tensors(learner).items() if not torch.equal(t, before[n])]
    assert [name for name in changed if "bias" not in name and "running" not in name
            and "tracked" not in name] == []  # fmt: skip


def test_a_gradient_that_is_no_number_stops_too(learner, batch):
    learner.step(batch, step=1, lr=0.01)
    parameter = learner._model.head.linears[0].weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    with pytest.raises(NonFiniteLossError, match="its gradient (nan|inf)"):
        learner.step(batch, step=2, lr=0.01)
    assert torch.equal(parameter, before)


def test_a_collapsed_representation_stops_the_run(learner, batch):
    with torch.no_grad():
        learner._model.head.linears[2].weight.zero_()
    assert learner.step(batch, step=9, lr=0.0).effective_rank is None
    with pytest.raises(CollapseError, match="step 10"):
        learner.step(batch, step=10, lr=0.0)


def test_an_untrained_representation_is_no_collapse(batch):
    for seed in range(5):
        config = LearnerConfig(CONFIG.encoder, seed, 0.1, 0.1, 2)
        assert Learner(config, torch.device("cpu")).step(batch, step=1, lr=0.0).effective_rank > 1
