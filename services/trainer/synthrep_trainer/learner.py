"""Towers, heads and optimizer as one thing: a batch in, one update, and what it was like.

The order of an update is fixed: loss, gradient, check, optimizer, moving average. Numbers that are
none stop it before the optimizer moves, or skip the step where that is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthrep_trainer import distributed
from synthrep_trainer.batches import Batch
from synthrep_trainer.checkpoint import Parts
from synthrep_trainer.encoder import Encoder, EncoderConfig, make_encoder, parameter_groups
from synthrep_trainer.errors import CollapseError, NonFiniteLossError
from synthrep_trainer.gradient_cache import backward_in_pieces, features_in_pieces
from synthrep_trainer.learner_state import load_parts, parts_of
from synthrep_trainer.moving_average import MovingAverage
from synthrep_trainer.objectives import (
    Features,
    Inputs,
    ObjectiveConfig,
    Outcome,
    Targets,
    TeacherTower,
    make_objective,
)
from synthrep_trainer.parallel import (
    Layout,
    make_mesh,
    replicate,
    scale_down,
    shard,
    total_norm,
)
from synthrep_trainer.randomness import seed_of, seeded
from synthrep_trainer.representation import Health, health, neighbour_accuracy, spread
from synthrep_trainer.schedules import Rates

_log = logging.getLogger(__name__)
_JUDGE_EVERY = 10  # steps; a judgement takes an eigendecomposition
# Half the mean squared distance of unit embeddings; fp32 rounding alone gives less than 1e-12.
_LEAST_SPREAD = 1e-6
_OBJECTIVE_SEED_OFFSET, _TOWER_SEED_OFFSET = 1, 2  # seeds of their own, beside the encoder's
_ROWS_PER_PASS = 256
_STUDENT, _TEACHER = 0, 1  # who draws random numbers in a step


@dataclass(frozen=True)
class LearnerConfig:
    """What a learner is made of and how it learns."""

    encoder: EncoderConfig
    objective: ObjectiveConfig
    seed: int
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    max_grad_norm: float | None = None
    """Norm above which a gradient is scaled down to it; None leaves gradients alone."""
    has_moving_average: bool = False
    """Whether the encoder's weights are averaged; an objective with a teacher needs it."""
    micro_batch_images: int | None = None
    """Images that the towers see at a time, rounded down to whole captions; None: all."""
    max_skipped_steps: int = 0
    """Steps in a row that are skipped because a number is none; one more stops the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of towers and heads; weights, losses and the optimizer stay in fp32."""


class StepResult(NamedTuple):
    """One update's numbers, of all ranks; the health, now and then, of this rank's rows."""

    loss: float
    lr: float
    gradient_norm: float
    """Before it is clipped."""
    health: Health | None
    terms: Mapping[str, float]
    """Parts of the loss and the like, by the objective."""
    is_skipped: bool
    knn_accuracy: float | None = None
    """See `Learner.neighbour_accuracy`."""


class Learner:
    """Learns from batches on one device; on several ranks, all of them make and call it alike."""

    def __init__(
        self,
        config: LearnerConfig,
        device: torch.device,
        *,
        is_compiled: bool = False,
        layout: Layout = "replicate",
    ) -> None:
        """Raises ValueError if there is no such encoder, or the objective lacks its average.

        `layout` says whether each rank holds the whole encoder and text tower, or a part.
        """
        self.config, self._device = config, device
        encoder = make_encoder(config.encoder, seed=config.seed)
        self._objective = make_objective(
            config.objective, config.encoder, encoder, seed=config.seed + _OBJECTIVE_SEED_OFFSET
        ).to(device)
        self._towers = self._objective.make_towers(
            encoder, seed=config.seed + _TOWER_SEED_OFFSET
        ).to(device)
        if self._objective.teacher_heads is not None and not config.has_moving_average:
            raise ValueError(f"{config.objective.name} needs a moving average: it is the teacher")
        self._average = MovingAverage(self._averaged()) if config.has_moving_average else None
        self._teacher = TeacherTower(self.best_encoder) if self._average else None
        if is_compiled:
            for used in (encoder, self.best_encoder):
                used.compile_blocks()
        self._parallel_towers = self._placed_towers(layout)
        self._parallel_objective = replicate(self._objective)
        self._model = nn.ModuleDict({"towers": self._towers, "objective": self._objective})
        groups = [parameter_groups(m, weight_decay=1.0) for m in (self._towers, self._objective)]
        self._optimizer = torch.optim.AdamW([*groups[0], *groups[1]], lr=0.0, betas=config.betas)
        self._decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        self._skipped_in_a_row = 0

    @property
    def best_encoder(self) -> Encoder:
        """The averaged encoder where there is one."""
        if self._average is None:
            return self._towers.encoder
        encoder = self._average.module["encoder"]
        assert isinstance(encoder, Encoder)
        return encoder

    def step(self, batch: Batch, *, step: int, rates: Rates) -> StepResult:
        """One update. Raises NonFiniteLossError or CollapseError before the optimizer moves."""
        buffers = [buffer.clone() for buffer in self._model.buffers()]  # in case of a skip
        self._optimizer.zero_grad(set_to_none=True)
        features, outcome = self._backward(batch, step)
        norm_of_all = total_norm(p.grad for p in self._model.parameters() if p.grad is not None)
        numbers = [outcome.loss.detach(), norm_of_all, *outcome.terms.values()]
        # The one place of a step where a GPU is waited for.
        value, norm, *terms = torch.stack([number.float() for number in numbers]).tolist()
        named = dict(zip(outcome.terms, terms, strict=True))
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._skip(value, norm, step, buffers)
            return StepResult(value, rates.lr, norm, None, named, True)
        self._skipped_in_a_row = 0
        judgement = self._judge(features, outcome, batch, step)
        if self.config.max_grad_norm is not None:
            scale_down(self._model.parameters(), self.config.max_grad_norm, norm_of_all)
        self._update(rates)
        return StepResult(value, rates.lr, norm, judgement, named, False)

    @torch.no_grad()
    def neighbour_accuracy(self, held_out: Batch) -> float | None:
        """Of the best encoder on the held-out images of all ranks; see `representation`."""
        counts = distributed.gather(torch.tensor([len(held_out.images)])).tolist()
        if not any(counts):
            return None
        # All ranks make equally many passes over equally many rows.
        missing = max(counts) - len(held_out.images)
        images = F.pad(held_out.images, (0, 0) * 3 + (0, missing))
        ids = F.pad(held_out.caption_ids, (0, missing))
        tower = (self._teacher or self._towers).eval()
        with self._autocast():
            passes = [
                tower(Inputs(rows.to(self._device))).images for rows in images.split(_ROWS_PER_PASS)
            ]
        self._towers.train()
        is_there = torch.cat([torch.arange(max(counts)) < count for count in counts])
        features = distributed.gather(torch.cat(passes).float()).cpu()[is_there]
        return neighbour_accuracy(features, distributed.gather(ids)[is_there])

    def parts(self) -> Parts:
        """All tensors of a checkpoint, by part."""
        progress = {"skipped_in_a_row": torch.tensor(self._skipped_in_a_row)}
        return parts_of(self._model, self._optimizer, self._average) | {"progress": progress}

    def load(self, parts: Parts) -> None:
        """Become what was saved; raises RuntimeError or KeyError if it was another model."""
        load_parts(parts, self._model, self._optimizer, self._average)
        self._skipped_in_a_row = int(parts["progress"]["skipped_in_a_row"])

    def _backward(self, batch: Batch, step: int) -> tuple[Features, Outcome]:
        """Gradients of the step, of all ranks."""
        inputs, caption_ids = self._inputs(batch, step)
        captions = len(caption_ids) // self.config.objective.rows_per_caption
        pieces = list(inputs.split(captions, self._captions_per_piece(captions)))
        targets = self._targets(pieces, step)

        def loss_of(features: Features) -> Outcome:
            with self._autocast():
                outcome: Outcome = self._parallel_objective(features, caption_ids, targets)
            return outcome

        in_pass = partial(self._pass, step, _STUDENT)
        if len(pieces) > 1:
            return backward_in_pieces(self._parallel_towers, pieces, loss_of, in_pass)
        with in_pass(0):
            features = self._parallel_towers(inputs)
        outcome = loss_of(features)
        outcome.loss.backward()
        return features, outcome

    def _targets(self, pieces: Sequence[Inputs], step: int) -> Targets | None:
        """What the teacher says of the batch, None for an objective without one."""
        if self._average is None or self._objective.teacher_heads is None:
            return None
        assert self._teacher is not None
        features = features_in_pieces(self._teacher, pieces, partial(self._pass, step, _TEACHER))
        with self._autocast():
            return self._objective.targets(self._average.module["heads"], features, step=step)

    def _inputs(self, batch: Batch, step: int) -> tuple[Inputs, Tensor]:
        batch = Batch._make(
            None if rows is None else rows.to(self._device, non_blocking=True) for rows in batch
        )
        inputs = Inputs(batch.images, batch.tokens, batch.crops)
        seed = seed_of(self.config.seed, step)
        return self._objective.complete(inputs, seed=seed), batch.caption_ids

    def _captions_per_piece(self, captions: int) -> int:
        limit = self.config.micro_batch_images
        rows = self.config.objective.rows_per_caption
        return captions if limit is None else max(1, limit // rows)

    @contextmanager
    def _pass(self, step: int, who: int, piece: int) -> Iterator[None]:
        """A block for one pass of towers: random numbers of its own, the asked precision."""
        parts = (self.config.seed, step, distributed.rank(), who, piece)
        with seeded(*parts, device=self._device), self._autocast():
            yield

    def _autocast(self) -> torch.autocast:
        is_half = self.config.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=is_half)

    def _skip(self, loss: float, norm: float, step: int, buffers: Sequence[Tensor]) -> None:
        """Undo what the step did to batch statistics; raises NonFiniteLossError past the bound."""
        for buffer, before in zip(self._model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        bound = self.config.max_skipped_steps
        if self._skipped_in_a_row >= bound:
            after = f", after {bound} skipped steps in a row" if bound else ""
            raise NonFiniteLossError(
                f"the loss is {loss} and its gradient {norm} at step {step}{after}; "
                "try a smaller lr"
            )
        self._skipped_in_a_row += 1
        _log.warning("step_skipped", extra={"step": step, "loss": loss, "gradient_norm": norm})

    def _update(self, rates: Rates) -> None:
        for group, decays in zip(self._optimizer.param_groups, self._decays, strict=True):
            group["lr"], group["weight_decay"] = rates.lr, rates.weight_decay * decays
        self._optimizer.step()
        self._objective.after_update()
        if self._average is not None:
            assert rates.ema_decay is not None
            self._average.update(self._averaged(), rates.ema_decay)

    def _placed_towers(self, layout: Layout) -> nn.Module:
        """The towers, and the teacher beside them, on this rank: whole or in part."""
        if layout == "replicate" or distributed.world_size() == 1:
            return replicate(self._towers)
        mesh = make_mesh(self._device)
        text = self._towers.text
        texts = [] if text is None else list(text.layers)
        shard(self._towers, [*self._towers.encoder.layers, *texts], mesh)
        if self._teacher is not None:
            shard(self._teacher, self._teacher.encoder.layers, mesh)
        return self._towers

    def _averaged(self) -> nn.ModuleDict:
        """What the moving average follows."""
        heads = self._objective.teacher_heads
        modules: dict[str, nn.Module] = {"encoder": self._towers.encoder}
        return nn.ModuleDict(modules if heads is None else modules | {"heads": heads})

    def _judge(
        self, features: Features, outcome: Outcome, batch: Batch, step: int
    ) -> Health | None:
        if step % _JUDGE_EVERY and step != 1:
            return None
        if spread(distributed.gather(outcome.embeddings)) < _LEAST_SPREAD:
            raise CollapseError(
                f"all embeddings are equal at step {step}: the representation has collapsed; "
                "try a smaller lr, a longer warm-up or more captions a batch"
            )
        return health(features.images, outcome.embeddings, batch.caption_ids)
