"""What travels over REST: requests and answers of both services, used by them and by the client.

Requests refuse unknown fields and wrong types. Fractions are 0-1, times RFC 3339, ids opaque.
"""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from synthrep_shared.samples import DATASET_PATTERN, SampleMetadata, normalise_caption

State = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
Objective = Literal["stablerep", "simclr"]
MAX_PROMPT_CHARACTERS = 1000
MAX_PROMPTS_PER_REQUEST = 1000
_MAX_COUNT = 10**9 - 1  # the steps that a checkpoint's name has room for


class Request(BaseModel):
    """Base of request bodies: strict types, unknown fields refused, finite numbers only."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Answer(BaseModel):
    """Base of answers; a client ignores fields that a newer service adds."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def clean_text(text: str) -> str:
    """The normalised text; raises ValueError for what no caption may hold."""
    for character in "" if text.isprintable() else text:
        category = unicodedata.category(character)
        if category in ("Cs", "Co", "Cn") or (category == "Cc" and character not in "\t\n\r"):
            raise ValueError("control, surrogate, private and unassigned characters are refused")
    return normalise_caption(text)


def clean_prompt(text: str) -> str:
    """As `clean_text`; raises ValueError for an empty prompt too."""
    prompt = clean_text(text)
    if not prompt:
        raise ValueError("a prompt must not be empty")
    return prompt


Prompt = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
    AfterValidator(clean_prompt),
]
DatasetName = Annotated[str, StringConstraints(pattern=DATASET_PATTERN)]
ProbeSetName = Annotated[
    str, StringConstraints(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
]
Alias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class GenerationSettings(Request):
    """How the images of a batch are made; fields that are None take the model's own default."""

    images_per_prompt: int = Field(default=10, ge=1, le=64)
    """Images per prompt: the positives of each other."""
    model: Alias = "tiny"
    """Alias of a text-to-image model in the service's configuration."""
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    """Classifier-free guidance; low values keep the images of a caption apart."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=250)
    """Denoising steps."""
    scheduler: Literal["ddim", "dpm++", "euler"] | None = None
    """Diffusion sampler."""
    negative_prompt: Annotated[
        str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(clean_text)
    ] = ""
    """Text to steer away from."""
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    """Makes image k of prompt i the same in every batch with this seed."""


class BatchRequest(GenerationSettings):
    """Body of `POST /v1/batches`."""

    dataset: DatasetName
    """Data set that the groups are committed to; made if absent."""
    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS_PER_REQUEST)
    """1-1,000 captions of up to 1,000 characters; each ends as one group or one failure."""
    priority: int = Field(default=5, ge=0, le=9)
    """0 is served first, 9 last."""


class BatchAccepted(Answer):
    """Answer 202 of `POST /v1/batches`: the prompts are durable from here on."""

    id: str
    dataset: str
    prompts_accepted: int
    links: dict[str, str]


class RejectedLine(Answer):
    """A line of an upload that is no prompt; lines count from 1."""

    line: int
    reason: str


class RejectedLines(Answer):
    """The lines of an upload that were left out: how many, and the first of them."""

    count: int
    first: list[RejectedLine]


class UploadAccepted(BatchAccepted):
    """Answer 202 of `POST /v1/batches/upload`."""

    rejected: RejectedLines


class PromptCounts(Answer):
    """Where the prompts of a batch are; accepted is the sum of the other five."""

    accepted: int
    queued: int
    running: int
    committed: int
    failed: int
    cancelled: int


class BatchView(Answer):
    """State and progress of a batch."""

    id: str
    dataset: str
    state: State
    prompts: PromptCounts
    images_committed: int
    images_per_s: float | None
    eta_s: float | None
    created_at: datetime


class FailureView(Answer):
    """A prompt that ended as a recorded failure."""

    index: int
    prompt: str
    reason: str
    attempts: int


class DatasetView(Answer):
    """Counts of a data set as its commit log has them."""

    name: str
    shards: int
    groups: int
    images: int
    bytes: int
    last_seq: int
    rejected: int = 0


class ShardView(Answer):
    """A sealed shard; `seq` is its position in the commit log."""

    seq: int
    name: str
    sha256: str
    bytes: int
    groups: int
    images: int
    created_at: datetime


class ShardEvent(ShardView):
    """A shard that was just sealed, as `GET /v1/events` tells it."""

    dataset: str


class GroupView(Answer):
    """Where the images of a prompt come from; `samples` is enough to make each of them again."""

    gid: str
    dataset: str
    batch: str
    index: int
    caption_id: str
    state: Literal["committed", "failed"]
    rejected: bool
    seq: int
    shard: str | None
    images: int
    samples: list[SampleMetadata]
    failure: FailureView | None
    created_at: datetime


class ModelView(Answer):
    """A text-to-image model that batches may name, with what it does unless told otherwise."""

    alias: str
    revision: str
    licence: str
    guidance_scale: float
    num_inference_steps: int
    scheduler: str
    generate_px: int
    store_px: int


class WorkerView(Answer):
    """A live generation worker."""

    name: str
    device: str
    state: str
    images_per_s: float | None


class QueueView(Answer):
    """Jobs that wait and run; `backlog_s` is None while no worker's speed is known."""

    depth: int
    running: int
    backlog_s: float | None


class ScaleView(Answer):
    """How many workers the accepted, unfinished work wants."""

    value: int


class HealthView(Answer):
    """Answer of the health checks."""

    status: Literal["ok"]


class FieldProblem(Answer):
    """One place of a request that does not fit."""

    field: str
    message: str


class Problem(Answer):
    """Problem details (RFC 9457): the body of every error, `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str | None = None
    errors: list[FieldProblem] | None = None


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


T = TypeVar("T")


class Page(Answer, Generic[T]):
    """Answer of every list."""

    items: list[T]
    next_cursor: str | None
