"""What travels between the trainer and its clients."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, model_validator

from synthrep_shared.messages.fields import Answer, DatasetName, ProbeSetName, Request, State

Objective = Literal["stablerep", "simclr"]
_MAX_COUNT = 10**9 - 1  # the steps that a checkpoint's name has room for


class RunRequest(Request):
    """Body of `POST /v1/runs`: what to train on which data set."""

    dataset: DatasetName
    """Data set whose commit log is followed; it may still be empty."""
    objective: Objective = "stablerep"
    """`stablerep`: images of one caption are positives; `simclr`: two crops of one image are."""
    model: str = Field(default="vit_synthrep_tiny", max_length=100, pattern=r"^[a-z0-9_.]+$")
    """`vit_synthrep_tiny` (width 128, depth 6, patch 4) or a vision transformer of timm."""
    image_size: int = Field(default=32, ge=16, le=512)
    """Side of the training crop, px."""
    images_per_caption: int | None = Field(default=None, ge=1, le=64)
    """Images drawn per caption and step, without replacement; None: 4, of simclr 1."""
    captions_per_batch: int = Field(default=64, ge=2, le=8192)
    """Captions per step, over all ranks."""
    max_steps: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Optimizer steps; give this or `max_images`."""
    max_images: int | None = Field(default=None, ge=1, lt=2**53)
    """Image views to train on."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of initialisation, order and augmentation."""
    lr: float = Field(default=1.5e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    """Weight decay of AdamW, on matrices only."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of the steps with a linearly rising learning rate; a cosine to 0 follows."""
    temperature: float = Field(default=0.1, gt=0, le=10)
    """Temperature of the contrastive loss."""
    min_fill_groups: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Groups that must be committed before the first step; None: one batch of captions."""
    max_uses_per_image: int = Field(default=100, ge=1, le=_MAX_COUNT)
    """How often a stored image may be drawn; the trainer waits for new ones at the bound."""
    checkpoint_every: int = Field(default=100, ge=1, le=_MAX_COUNT)
    """Steps between checkpoints."""
    probe_every: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Steps between probes of the newest checkpoint; None: no probes during the run."""
    probe_datasets: list[ProbeSetName] = Field(default=[], max_length=20)
    """Labelled sets of the probes during the run, see `GET /v1/probe-datasets`."""

    @model_validator(mode="after")
    def _has_an_end_and_sets_to_probe(self) -> RunRequest:
        if (self.max_steps is None) == (self.max_images is None):
            raise ValueError("give either max_steps or max_images")
        if (self.probe_every is None) == bool(self.probe_datasets):
            raise ValueError("probe_every and probe_datasets belong together")
        if len(set(self.probe_datasets)) < len(self.probe_datasets):
            raise ValueError("probe_datasets names a set twice")
        return self


class RunView(Answer):
    """State and progress of a training run."""

    id: str
    state: State
    request: dict[str, Any]
    step: int
    max_steps: int
    images_seen: int
    loss: float | None
    generated_per_trained: float | None
    images_per_s: float | None
    created_at: datetime
    error: str | None


class CheckpointView(Answer):
    """A complete checkpoint folder."""

    step: int
    path: str
    sha256: str
    created_at: datetime


class ProbeRequest(Request):
    """Body of `POST /v1/probes`: give a run (its newest checkpoint) or a checkpoint's path."""

    run_id: str | None = Field(default=None, max_length=100)
    """Run whose newest checkpoint is judged when the probe starts."""
    checkpoint: str | None = Field(default=None, max_length=1000)
    """A checkpoint as `GET /v1/runs/{id}/checkpoints` names it."""
    dataset: ProbeSetName
    """Name of a labelled set, see `GET /v1/probe-datasets`."""
    protocol: Literal["linear", "knn"] = "linear"
    """How frozen features are judged."""

    @model_validator(mode="after")
    def _names_one_checkpoint(self) -> ProbeRequest:
        if (self.run_id is None) == (self.checkpoint is None):
            raise ValueError("give either run_id or checkpoint")
        return self


class ProbeView(Answer):
    """State and result of a probe; value, interval and baselines are None until it is completed."""

    id: str
    state: State
    request: dict[str, Any]
    checkpoint: str | None = None
    dataset: str
    protocol: str
    metric: str | None = None
    value: float | None = None
    ci95: tuple[float, float] | None = None
    n_test: int | None = None
    chosen: float | None = None
    curve: list[dict[str, float]] | None = None
    per_class: list[dict[str, Any]] | None = None
    baselines: dict[str, Any] | None = None
    seconds: float | None = None
    created_at: datetime
    error: str | None = None


class ProbeSetView(Answer):
    """A labelled set that probes may name; `error` says what is wrong with a broken one."""

    name: str
    classes: list[str] | None
    """Names by class index, None where the set does not tell them."""
    splits: list[str]
    metric: str | None
    error: str | None = None
