"""Encoder, head and optimizer as one thing: a batch in, one update, and what it was like.

The order of an update is fixed: loss, gradient, check, optimizer. Numbers that are none stop it
before the optimizer moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synthrep_trainer import distributed
from synthrep_trainer.augment import normalise
from synthrep_trainer.batches import Batch
from synthrep_trainer.checkpoint import Parts
from synthrep_trainer.encoder import (
    EncoderConfig,
    make_encoder,
    make_projection_head,
    parameter_groups,
)
from synthrep_trainer.errors import CollapseError, NonFiniteLossError
from synthrep_trainer.losses import multi_positive_contrastive_loss
from synthrep_trainer.representation import effective_rank, spread

_BETAS = (0.9, 0.98)
_JUDGE_EVERY = 10  # steps; a judgement takes an eigendecomposition
# Half the mean squared distance of unit embeddings; fp32 rounding alone gives less than 1e-12.
_LEAST_SPREAD = 1e-6
_HEAD_SEED_OFFSET = 1  # encoder and head draw from seeds of their own
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LearnerConfig:
    """What a learner is made of and how it learns."""

    encoder: EncoderConfig
    seed: int
    temperature: float
    weight_decay: float
    rows_per_caption: int
    """Adjacent rows of a batch that belong to one caption; the head normalises over captions."""


class StepResult(NamedTuple):
    """One update's numbers, of all ranks; the effective rank, now and then, of this rank's rows."""

    loss: float
    lr: float
    gradient_norm: float
    effective_rank: float | None


class _Model(nn.Module):
    def __init__(self, config: EncoderConfig, *, seed: int) -> None:
        super().__init__()
        self.encoder = make_encoder(config, seed=seed)
        self.head = make_projection_head(config, self.encoder.width, seed=seed + _HEAD_SEED_OFFSET)

    def forward(
        self, images: UInt8[Tensor, "batch height width 3"], rows_per_caption: int
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch dim"]]:
        features = self.encoder(normalise(images))
        return features, self.head(features, rows_per_caption)


class Learner:
    """Learns from batches on one device; on several ranks, all of them make and call it alike."""

    def __init__(self, config: LearnerConfig, device: torch.device) -> None:
        """Raises ValueError if there is no such encoder."""
        self.config = config
        self._device = device
        self._model = _Model(config.encoder, seed=config.seed).to(device)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, weight_decay=config.weight_decay), lr=0.0, betas=_BETAS
        )
        self._parallel: nn.Module = self._model
        if distributed.world_size() > 1:
            # The head's running statistics are equal on all ranks already.
            self._parallel = DistributedDataParallel(self._model, broadcast_buffers=False)

    def step(self, batch: Batch, *, step: int, lr: float) -> StepResult:
        """One update. Raises NonFiniteLossError or CollapseError before the optimizer moves."""
        images = batch.images.to(self._device, non_blocking=True)
        caption_ids = batch.caption_ids.to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            features, embeddings = self._parallel(images, self.config.rows_per_caption)
        loss = multi_positive_contrastive_loss(embeddings, caption_ids, self.config.temperature)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        total_norm = torch.nn.utils.get_total_norm(gradients)
        # The one place of a step where a GPU is waited for.
        value, norm = torch.stack([loss.detach(), total_norm]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"the loss is {value} and its gradient {norm} at step {step}; try a smaller lr"
            )
        rank = self._judge(features, embeddings, step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return StepResult(value, lr, norm, rank)

    def parts(self) -> Parts:
        """All tensors of a checkpoint, by part."""
        return {
            "encoder": self._model.encoder.state_dict(),
            "head": self._model.head.state_dict(),
            "optimizer": dict(self._optimizer_tensors()),
        }

    def load(self, parts: Parts) -> None:
        """Become what was saved; raises RuntimeError or KeyError if it was another model."""
        self._model.encoder.load_state_dict(dict(parts["encoder"]))
        self._model.head.load_state_dict(dict(parts["head"]))
        tensors = parts["optimizer"]
        for name, parameter in self._model.named_parameters():
            # AdamW keeps its step count on the CPU and its moments with the parameter.
            self._optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(
                    "cpu" if key == "step" else self._device, copy=True
                )
                for key in _OPTIMIZER_STATE
            }

    def _judge(self, features: Tensor, embeddings: Tensor, step: int) -> float | None:
        if step % _JUDGE_EVERY and step != 1:
            return None
        if spread(distributed.gather(embeddings)) < _LEAST_SPREAD:
            raise CollapseError(
                f"all embeddings are equal at step {step}: the representation has collapsed; "
                "try a smaller lr, a longer warm-up or more captions a batch"
            )
        return effective_rank(features)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            state: Mapping[str, Tensor] = self._optimizer.state[parameter]
            for key in _OPTIMIZER_STATE:
                yield f"{key}.{name}", state[key]
