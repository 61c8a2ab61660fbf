"""Settings of the generator's processes, from `SYNTHREP_GENERATOR_…` environment variables."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from synthrep_generator.model_catalogue import CATALOGUE, LORA_FOLDER
from synthrep_shared.settings import ServiceSettings

Sampler = Literal["ddim", "dpm++", "euler", "euler-a", "lcm", "flow-match"]


class LoraConfig(BaseModel):
    """A LoRA that is fused into a model when it is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: Path
    """A safetensors file; relative to the model's folder."""
    scale: float = Field(default=1.0, ge=-10, le=10)
    """Strength."""


class ModelConfig(BaseModel):
    """A text-to-image model that clients may name by its alias."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: Path
    """Folder of a diffusers pipeline; safetensors only."""
    variant: str | None = Field(default=None, pattern="^[a-z0-9_]{1,20}$")
    """Which of several weight files of a part, for instance fp16; others where a part lacks it."""
    revision: str = "local"
    """What the samples' JSON records as the model's revision; that of the manifest has priority."""
    guidance_scale: float = Field(default=2.0, ge=0, le=30)
    """Default guidance: classifier-free, or what a distilled model takes in its place."""
    num_inference_steps: int = Field(default=50, ge=1, le=250)
    """Default denoising steps."""
    scheduler: Sampler = "ddim"
    """Default sampler; the kind of pipeline decides which it takes."""
    scheduler_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the diffusers scheduler that differ from the model's own."""
    generate_px: int = Field(default=512, ge=8, le=4096)
    """Side of the image that the pipeline makes, px."""
    store_px: int = Field(default=256, ge=8, le=4096)
    """Side of the stored image, px."""
    device_batch_images: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Images in one pass through the pipeline, over all prompts of a job; `auto` searches the best
    number when the model is first loaded on a kind of device, and remembers it."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of text encoders and denoiser; `auto`: bf16 where the device multiplies it,
    else fp16 on CUDA and fp32 on a CPU."""
    channels_last: bool = False
    """Whether convolutions keep channels in the last place of memory."""
    compile: bool = False
    """Whether torch.compile makes kernels for the denoiser, at the cost of a slow first batch."""
    attention: Literal["sdpa", "math", "efficient", "flash", "cudnn"] = "sdpa"
    """Kernel of scaled dot product attention; `sdpa` leaves the choice to torch."""
    vae_tiling: bool = False
    """Whether large images are decoded in tiles, with less memory and faint seams."""
    loras: tuple[LoraConfig, ...] = ()
    """LoRA files: path and scale each, fused in this order."""
    licence: str = ""
    """Shown by `GET /v1/models`."""

    @property
    def lora_names(self) -> tuple[str, ...]:
        """The LoRA files with their scales, as samples record them."""
        return tuple(f"{lora.path.name}@{lora.scale:g}" for lora in self.loras)


def _tiny() -> dict[str, ModelConfig]:
    """The model that the repository carries, as a user of a checkout has it."""
    path = Path(str(resources.files("synthrep_generator"))).parents[2] / "models" / "tiny"
    return {
        "tiny": ModelConfig(
            path=path,
            revision="tiny-1",
            guidance_scale=3.0,
            num_inference_steps=15,
            scheduler="dpm++",
            generate_px=32,
            store_px=32,
            device_batch_images=40,
            licence="see the model card",
        )
    }


def catalogue_model(alias: str, model_cache: Path, /, **given: Any) -> dict[str, Any]:
    """Fields of a catalogue's model in the cache; those that are `given` have priority."""
    entry = CATALOGUE[alias]
    return {
        "path": model_cache.expanduser() / alias,
        "licence": entry.licence,
        "loras": [{"path": f"{LORA_FOLDER}/{lora.name}"} for lora in entry.loras],
        **entry.settings,
        **given,
    }


class GeneratorSettings(ServiceSettings):
    """What the generator's API, reconciler and workers read."""

    model_config = SettingsConfigDict(env_prefix="SYNTHREP_GENERATOR_")

    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the API."""
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis or Valkey that holds the work in hand."""
    queue: str = Field(default="synthrep", pattern="^[a-z0-9_-]{1,64}$")
    """Name of the one RQ queue."""
    model_cache: Path = Path("~/.cache/synthrep/models")
    """Folder that `synthrep models pull` fills: one folder for each alias of the catalogue."""
    models: dict[str, ModelConfig] = Field(default_factory=_tiny, min_length=1)
    """Aliases that clients may name, as JSON, beside those of the catalogue that were pulled; an
    alias of the catalogue has the catalogue's values where none are given. Workers load the first
    one when they start."""
    batch_sizes: Path = Path("~/.cache/synthrep/batch-sizes.json")
    """File in which workers remember the best device batch of each model and kind of device."""
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    """Device of a worker; `auto` takes CUDA where there is one."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a worker's device process; 0 leaves the choice to torch."""
    job_images: int = Field(default=160, ge=1, le=100_000)
    """Images that one job aims at: 5-30 s of device work, one shard."""
    jobs_ahead: int = Field(default=3, ge=1, le=1000)
    """Jobs kept in the queue for each live worker."""
    lease_s: float = Field(default=30.0, gt=0)
    """A worker silent for so long has lost its job."""
    sweep_s: float = Field(default=2.0, gt=0)
    """Pause between two passes of the reconciler."""
    job_limit_s: float = Field(default=600.0, gt=0)
    """Wall clock after which a job's process is killed."""
    hang_s: float = Field(default=60.0, gt=0)
    """A job's process that shows no progress for so long, and thrice its usual pause, is killed."""
    idle_exit_s: float = Field(default=0.0, ge=0)
    """A worker without work for so long ends with status 0, for pools of jobs; 0: never."""
    heartbeat: Path | None = None
    """File that the worker and the reconciler touch every second, for health checks; it holds the
    worker's state."""
    max_growth_bytes: int = Field(default=4 << 30, ge=0)
    """Memory that a job's process may gain after it warmed up; beyond, it is replaced by a new one
    between two jobs."""
    max_strikes: int = Field(default=4, ge=1)
    """Crashes of the device process after which a lone prompt is recorded as failed."""
    high_water_prompts: int = Field(default=2_000_000, ge=1)
    """Accepted and unfinished prompts above which new batches are refused."""
    low_water_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the high water down to which batches go on being refused after that."""
    reserve_bytes: int = Field(default=1 << 30, ge=0)
    """Free disk space below which new batches are refused and workers wait."""
    max_body_bytes: int = Field(default=2 << 20, ge=1024)
    """Cap on a request body, uploads excepted."""
    clip_path: Path | None = None
    """Folder of a transformers CLIP model in safetensors; quality gates may ask for its score."""
    safety_checker_path: Path | None = None
    """Folder of a safety checker and its preprocessor, before those in the models' own folders."""
    synthesizer: Literal["diffusers", "fake"] = "diffusers"
    """`fake` paints patterns from prompt and seed, for tests of everything around the model."""
    fake_delay_s: float = Field(default=0.0, ge=0)
    """Time that the fake synthesizer takes for an image."""
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of stored images."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of stored JPEG and WebP images."""

    @field_validator("models", mode="before")
    @classmethod
    def _fill_from_catalogue(cls, models: Any, info: ValidationInfo) -> Any:
        if not isinstance(models, dict) or "model_cache" not in info.data:
            return models
        return {
            alias: catalogue_model(alias, info.data["model_cache"], **fields)
            if alias in CATALOGUE and isinstance(fields, dict)
            else fields
            for alias, fields in models.items()
        }
