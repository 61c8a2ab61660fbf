"""What travels between the generator and its clients."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from synthrep_shared.messages.fields import (
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS_PER_REQUEST,
    Alias,
    Answer,
    DatasetName,
    Prompt,
    Request,
    State,
    clean_text,
)
from synthrep_shared.samples import SampleMetadata

Scheduler = Literal["ddim", "dpm++", "euler", "euler-a", "lcm", "flow-match"]


class QualityGate(Request):
    """Which images of a batch are refused, and made again with their next seed."""

    blank: bool = True
    """Images of next to one colour."""
    duplicates: bool = True
    """Images that look like another of their group, or of a group of the batch made lately."""
    safety: bool = False
    """Images that the model's own or the configured safety checker marks."""
    min_clip_score: float | None = Field(default=None, ge=-1, le=1)
    """Least cosine of image and caption, as the configured CLIP model has it."""
    max_attempts: int = Field(default=4, ge=1, le=16)
    """Seeds tried for an image before its prompt ends as a failure."""


class MixtureComponent(Request):
    """One way of making images; fields that are None take the batch's value, then the model's."""

    model: Alias | None = None
    """Alias of a text-to-image model in the service's configuration."""
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    """Classifier-free guidance."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=250)
    """Denoising steps."""
    scheduler: Scheduler | None = None
    """Diffusion sampler."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Share of the prompts, relative to the other components."""

    def completed(self, variant: GenerationSettings) -> MixtureComponent:
        """This component with nothing left open: `variant` is made of it."""
        own = {name: getattr(variant, name) for name in type(self).model_fields if name != "weight"}
        return self.model_copy(update=own)


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
    scheduler: Scheduler | None = None
    """Diffusion sampler."""
    negative_prompt: Annotated[
        str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(clean_text)
    ] = ""
    """Text to steer away from."""
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    """Makes image k of prompt i the same in every batch with this seed."""
    quality_gate: QualityGate | None = None
    """Makes poor images again; none: an image of exactly one colour fails its prompt, no more."""
    mixture: tuple[MixtureComponent, ...] = Field(default=(), max_length=16)
    """Deals the prompts out to these, by weight, evenly over the batch; empty: no mixture."""
    long_captions: Literal["truncate", "refuse"] = "truncate"
    """What becomes of a prompt that is longer than the text encoder's window: made of its start
    and flagged in the samples' JSON, or a recorded failure."""

    def variants(self) -> tuple[GenerationSettings, ...]:
        """The settings without mixture that prompts are made with, one for each component."""
        return tuple(self._variant(component) for component in self.mixture) or (self,)

    def _variant(self, component: MixtureComponent) -> GenerationSettings:
        given = component.model_dump(exclude={"weight"}, exclude_none=True)
        return self.model_copy(update={**given, "mixture": ()})


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
