"""Settings of the generator's processes, from `SYNTHREP_GENERATOR_…` environment variables."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from synthrep_shared.settings import ServiceSettings


class ModelConfig(BaseModel):
    """A text-to-image model that clients may name by its alias."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: Path
    """Folder of a diffusers pipeline; safetensors only."""
    revision: str = "local"
    """What the samples' JSON records as the model's revision."""
    guidance_scale: float = Field(default=2.0, ge=0, le=30)
    """Default classifier-free guidance."""
    num_inference_steps: int = Field(default=50, ge=1, le=250)
    """Default denoising steps."""
    scheduler: Literal["ddim", "dpm++", "euler"] = "ddim"
    """Default sampler."""
    generate_px: int = Field(default=512, ge=8, le=2048)
    """Side of the image that the pipeline makes, px."""
    store_px: int = Field(default=256, ge=8, le=2048)
    """Side of the stored image, px."""
    device_batch_images: int = Field(default=40, ge=1, le=1024)
    """Images in one pass through the pipeline, over all prompts of a job."""
    licence: str = ""
    """Shown by `GET /v1/models`."""


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
            device_batch_images=80,
            licence="see the model card",
        )
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
    models: dict[str, ModelConfig] = Field(default_factory=_tiny)
    """Aliases that clients may name, as JSON."""
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
    max_strikes: int = Field(default=4, ge=1)
    """Crashes of the device process after which a lone prompt is recorded as failed."""
    high_water_prompts: int = Field(default=2_000_000, ge=1)
    """Accepted and unfinished prompts above which new batches are refused."""
    reserve_bytes: int = Field(default=1 << 30, ge=0)
    """Free disk space below which new batches are refused and workers wait."""
    max_body_bytes: int = Field(default=2 << 20, ge=1024)
    """Cap on a request body, uploads excepted."""
    synthesizer: Literal["diffusers", "fake"] = "diffusers"
    """`fake` paints patterns from prompt and seed, for tests of everything around the model."""
    fake_delay_s: float = Field(default=0.0, ge=0)
    """Time that the fake synthesizer takes for an image."""
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of stored images."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of stored JPEG and WebP images."""
