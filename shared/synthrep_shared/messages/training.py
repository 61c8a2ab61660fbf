"""What travels between the trainer and its clients."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from synthrep_shared.messages.fields import Answer, DatasetName, ProbeSetName, Request, State

Objective = Literal["stablerep", "stablerep+", "simclr", "clip", "synclr"]
_MAX_COUNT = 10**9 - 1  # the steps that a checkpoint's name has room for
_SOURCE = r"^https?://[A-Za-z0-9.:\[\]-]{1,255}/v1/datasets/[a-z0-9][a-z0-9_-]{0,63}$"
SourceUrl = Annotated[str, StringConstraints(pattern=_SOURCE)]
"""A data set of a generator, as `https://host:8000/v1/datasets/birds`."""


class TextOptions(Request):
    """Sizes of the text tower of `clip` and `stablerep+`; CLIP's are 512, 12, 8, 512."""

    width: int = Field(default=128, ge=8, le=4096)
    """Dimension of its tokens."""
    layers: int = Field(default=2, ge=1, le=64)
    heads: int = Field(default=4, ge=1, le=64)
    """Attention heads a layer; they divide the width."""
    dim: int = Field(default=128, ge=2, le=4096)
    """Dimension of the space that images and texts share."""
    context: int = Field(default=128, ge=8, le=1024)
    """Bytes of a caption that are read, and two."""

    @model_validator(mode="after")
    def _is_divided(self) -> TextOptions:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self


class SynclrOptions(Request):
    """Sizes and rates of `synclr`; the paper has 4, 4096, 256, 2048, 256, 65536."""

    crops_per_image: int = Field(default=2, ge=1, le=16)
    """Small crops of each image, beside the view."""
    crop_size: int | None = Field(default=None, ge=8, le=512)
    """Side of a small crop, px, a multiple of the patch; None: about 3/7 of the view's."""
    hidden: int = Field(default=512, ge=8, le=16384)
    """Width of the hidden layers of projector and predictor."""
    dim: int = Field(default=128, ge=2, le=4096)
    """Dimension of the embeddings."""
    patch_hidden: int = Field(default=256, ge=8, le=16384)
    """Width of the hidden layers of the head of masked patches."""
    bottleneck: int = Field(default=64, ge=2, le=4096)
    """Dimension in which patches meet prototypes."""
    prototypes: int = Field(default=512, ge=2, le=2**20)
    masked_images: float = Field(default=0.5, gt=0, le=1)
    """Share of the images that have masked patches."""
    masked_patches: float = Field(default=0.5, gt=0, lt=1)
    """Share of the patches that are masked in them."""
    teacher_warmup_steps: int = Field(default=4000, ge=0, le=_MAX_COUNT)
    """Steps in which the teacher's temperature rises from 0.04 to 0.07."""


class RunRequest(Request):
    """Body of `POST /v1/runs`: what to train on which data set."""

    dataset: DatasetName | None = None
    """Data set whose commit log is followed; it may still be empty. Give this or `source_url`."""
    source_url: SourceUrl | None = None
    """The same behind a generator's API, `https://host:8000/v1/datasets/birds`, which needs no
    shared disk; only addresses that the trainer's settings allow."""
    objective: Objective = "stablerep"
    """What are positives. `stablerep`: images of one caption; `simclr`: two crops of one image;
    `clip`: an image and its caption; `stablerep+`: the first and the third; `synclr`: as the first,
    against an averaged teacher, with small crops and masked modelling."""
    model: str = Field(default="vit_synthrep_tiny", max_length=100, pattern=r"^[a-z0-9_.]+$")
    """`vit_synthrep_tiny` (width 128, depth 6, patch 4) or a vision transformer of timm."""
    image_size: int = Field(default=32, ge=16, le=512)
    """Side of the training crop, px."""
    images_per_caption: int | None = Field(default=None, ge=1, le=64)
    """Images drawn per caption and step, without replacement; None: 4, of simclr and clip 1."""
    captions_per_batch: int = Field(default=64, ge=2, le=8192)
    """Captions per step, over all ranks."""
    max_steps: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Optimizer steps; give this or `max_images`."""
    max_images: int | None = Field(default=None, ge=1, lt=2**53)
    """Image views to train on."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of initialisation, order and augmentation."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate of AdamW; None: 1.5e-3, of clip, stablerep+ and synclr 3e-4."""
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    """Weight decay of AdamW, on matrices only."""
    final_weight_decay: float | None = Field(default=None, ge=0, le=1)
    """What weight decay becomes along a cosine; None: it stays."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay of AdamW's second moment; None: 0.98, of synclr 0.999."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of the steps with a linearly rising learning rate; a cosine to 0 follows."""
    temperature: float = Field(default=0.1, gt=0, le=10)
    """Temperature of the contrastive loss; that of image and text is learned."""
    image_weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the loss of images among each other in stablerep+."""
    text_weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the loss of images and texts in stablerep+."""
    text: TextOptions = TextOptions()
    synclr: SynclrOptions = SynclrOptions()
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)
    """Greatest rate of stochastic depth."""
    downsample_probability: float = Field(default=0.0, ge=0, le=1)
    """Chance that a view loses resolution first; 0.05 in the paper's variant."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Decay of a moving average of the weights, which probes then judge; None: there is none, of
    synclr 0.994, and less where the run is shorter than 3,333 steps."""
    ema_final_decay: float | None = Field(default=None, ge=0, le=1)
    """What that decay becomes along a cosine; None: it stays, of synclr 1."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Norm above which a gradient is scaled down to it; None leaves gradients alone."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no number does: end the run, or skip its step."""
    max_skipped_steps: int = Field(default=10, ge=1, le=_MAX_COUNT)
    """Steps in a row that may be skipped before the run ends all the same."""
    micro_batch_images: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Images that a device sees at a time, in whole captions; gradients stay those of the batch.
    None: all at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of encoder and heads; auto: bf16 on CUDA, else fp32. Losses are always fp32."""
    min_fill_groups: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Groups that must be committed before the first step; None: one batch of captions."""
    max_uses_per_image: int = Field(default=100, ge=1, le=_MAX_COUNT)
    """How often a stored image may be drawn; the trainer waits for new ones at the bound."""
    max_age_groups: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Only so many of the newest groups are trained on; None: all of them."""
    min_generated_per_trained: float | None = Field(default=None, gt=0, le=1000)
    """Committed images for each image view trained on; below that the trainer waits for new ones.
    None: it does not."""
    pause_generation_above: int | None = Field(default=None, ge=1, lt=2**53)
    """Committed images not yet trained on above which the generator is asked to pause the data
    set's batches, until half of them are used; None: it is left alone."""
    checkpoint_every: int = Field(default=100, ge=1, le=_MAX_COUNT)
    """Steps between checkpoints."""
    probe_every: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Steps between probes of the newest checkpoint; None: no probes during the run."""
    probe_datasets: list[ProbeSetName] = Field(default=[], max_length=20)
    """Labelled sets of the probes during the run, see `GET /v1/probe-datasets`."""
    knn_every: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Steps between looks at held-out captions: how often the nearest image is of the same one.
    None: no caption is held out."""
    knn_held_out: float = Field(default=0.02, gt=0, le=0.5)
    """Share of captions, by their ids, that are held out from training for that."""
    knn_captions: int = Field(default=256, ge=2, le=100_000)
    """Held-out captions that are looked at, the first of the data set, with up to 4 images."""

    @model_validator(mode="after")
    def _has_an_end_and_sets_to_probe(self) -> RunRequest:
        if (self.max_steps is None) == (self.max_images is None):
            raise ValueError("give either max_steps or max_images")
        if (self.dataset is None) == (self.source_url is None):
            raise ValueError("give either dataset or source_url")
        fill = max(self.captions_per_batch, self.min_fill_groups or 0)
        if self.max_age_groups is not None and self.max_age_groups < fill:
            raise ValueError(f"max_age_groups must be at least {fill}, what the first batch takes")
        if (self.probe_every is None) == bool(self.probe_datasets):
            raise ValueError("probe_every and probe_datasets belong together")
        if len(set(self.probe_datasets)) < len(self.probe_datasets):
            raise ValueError("probe_datasets names a set twice")
        has_average = self.ema_decay is not None or self.objective == "synclr"
        if self.ema_final_decay is not None and not has_average:
            raise ValueError("ema_final_decay needs an ema_decay to begin with")
        return self

    @property
    def dataset_name(self) -> str:
        """Name of the data set, wherever it is."""
        return self.dataset or (self.source_url or "").rpartition("/")[2]


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
    shards_quarantined: int = 0
    """Shards that the run leaves out because they are not what the commit log says."""
    waiting_for: str = ""
    """What a running run waits for, such as `captions: 16 of 64 are there`; empty: for nothing."""
    created_at: datetime
    error: str | None


class CheckpointView(Answer):
    """A complete checkpoint folder."""

    step: int
    path: str
    sha256: str
    created_at: datetime
    knn_accuracy: float | None = None
    """Of held-out captions, 0 to 1, where the run has some: the best is kept."""


class ProbeRequest(Request):
    """Body of `POST /v1/probes`: give a run (its newest checkpoint) or a checkpoint's path."""

    run_id: str | None = Field(default=None, max_length=100)
    """Run whose newest checkpoint is judged when the probe starts."""
    checkpoint: str | None = Field(default=None, max_length=1000)
    """A checkpoint as `GET /v1/runs/{id}/checkpoints` names it."""
    dataset: ProbeSetName
    """Name of a labelled set, see `GET /v1/probe-datasets`."""
    protocol: Literal["linear", "knn", "fewshot", "imagenet-linear"] = "linear"
    """How frozen features are judged."""
    episodes: int = Field(default=5000, ge=10, le=100_000)
    """Tasks that `fewshot` draws."""
    batch_norm: bool = False
    """Whether `imagenet-linear` normalises features by batch, without parameters."""
    weights: Literal["auto", "last", "ema"] = "auto"
    """Which encoder: of the last step, or averaged; auto: averaged where the checkpoint has it."""

    @model_validator(mode="after")
    def _names_one_checkpoint(self) -> ProbeRequest:
        if (self.run_id is None) == (self.checkpoint is None):
            raise ValueError("give either run_id or checkpoint")
        return self


class ProbeSetRequest(Request):
    """Body of `POST /v1/probe-datasets` for a folder of the server."""

    name: ProbeSetName
    """Name of the new set; none that is there."""
    folder: str = Field(min_length=1, max_length=4000)
    """Folder with `train` and `test`, as folders of classes or tars, under an allowed root."""


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
    settings: dict[str, float] | None = None
    """What the protocol was told beside its name."""
    curve: list[dict[str, float]] | None = None
    per_class: list[dict[str, Any]] | None = None
    confusion: list[dict[str, Any]] | None = None
    """`{"truth": …, "predicted": …, "count": …}`, the most frequent mistakes first."""
    hits: str | None = None
    """A bit a test image, by class, then by place in the set, hex; 1: named rightly."""
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
