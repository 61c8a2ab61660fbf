"""Settings of the trainer's processes, from `SYNTHREP_TRAINER_…` environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints
from pydantic_settings import SettingsConfigDict

from synthrep_shared.settings import ServiceSettings

Origin = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.:\[\]-]{1,255}$")]
"""`scheme://host:port`."""


def _shared_probe_data() -> Path | None:
    folder = os.environ.get("SYNTHREP_PROBE_DATA")
    return Path(folder) if folder else None


class TrainerSettings(ServiceSettings):
    """What the trainer's API, launcher, train processes and probe workers read."""

    model_config = SettingsConfigDict(env_prefix="SYNTHREP_TRAINER_")

    port: int = Field(default=8001, ge=0, le=65535)
    """Port of the API."""
    runs: Path = Path("runs/trainer")
    """Folder of the runs and probes; the API, the launcher and its processes see the same one."""
    probe_data: Path | None = Field(default_factory=_shared_probe_data)
    """Folder with `probe/NAME/{train,val,test}.tar`; without it SYNTHREP_PROBE_DATA is taken."""
    probe_originals: Path | None = None
    """Folder with published labelled sets as torchvision and their authors lay them out, for one
    `cifar-10-batches-bin`, `food-101`, `VOCdevkit/VOC2007`; empty: none."""
    probe_folder_roots: tuple[Path, ...] = ()
    """Folders, a JSON list; what lies below them may be named as a labelled set over the API."""
    probe_upload_bytes: int = Field(default=1 << 30, ge=1024)
    """Cap on a labelled set that is uploaded as a zip."""
    probe_cache_bytes: int = Field(default=20 << 30, ge=0)
    """Bound on `probe-cache` in the folder of runs: features of probes by checkpoint and set, and
    scores of baselines; 0 keeps none. One probe may need more until it ends."""
    map_images: int = Field(default=400, ge=0, le=2000)
    """Images of a run's data set on the map of its features, which a probe draws when it has judged
    a checkpoint; 0 draws none."""
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    """Device of train processes; `auto` takes CUDA where there is one."""
    probe_device: str = Field(default="cpu", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    """Device of probes; a GPU is shared with the training that goes on."""
    processes_per_run: int = Field(default=1, ge=1, le=1024)
    """Train processes of one run on this host, through torchrun; one a device."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads of torch in each train or probe process; 0 leaves the choice to torch."""
    loader_threads: int = Field(default=1, ge=1, le=256)
    """Threads that decode and augment in each train process."""
    prefetch_batches: int = Field(default=2, ge=1, le=64)
    """Batches that are made ready ahead of the step that takes them."""
    poll_s: float = Field(default=0.05, gt=0, le=60)
    """Pause between two looks at the commit log while waiting for it to grow."""
    verify_s: float = Field(default=10.0, gt=0)
    """Time spent on verifying new shards before a window opens that could open already."""
    allowed_sources: tuple[Origin, ...] = ()
    """Generators that are asked for shards and pauses, a JSON list of `https://host:port`; what a
    run's `source_url` names must be among them."""
    source_keys: dict[Origin, SecretStr] = Field(default={})
    """The key for each of them that wants one, a JSON object by address, at best from a file."""
    generator_url: Origin | None = None
    """The generator that fills the root's data sets: the page shows it, with the key of whoever
    looks, runs that say so pause and resume its batches, and shards may come from it as well."""
    generator_public_url: Origin | None = None
    """Its address as people reach it, for the commands that the page shows; empty: the same."""
    source_poll_s: float = Field(default=5.0, gt=0, le=600)
    """Longest pause between two looks at a generator's log; an event of it shortens the pause."""
    layout: Literal["replicate", "shard"] = "replicate"
    """Whether each process of a run holds the whole encoder (DDP), or a part of it (FSDP2)."""
    compile: bool = False
    """Whether torch compiles the encoder's blocks; needs a C++ compiler, on CUDA too."""
    wandb_project: str = ""
    """Project of Weights & Biases that runs are shown in, if wandb is installed; empty: none."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """Whether wandb sends numbers at once, or keeps them in the run's folder for `wandb sync`."""
    mlflow_uri: str = ""
    """Address of an MLflow server that runs are shown in, if mlflow is installed; empty: none."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept, beside the one that knew held-out captions best."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints at multiples of so many steps are kept for ever; 0 keeps none of them."""
    max_runs: int = Field(default=1, ge=1, le=64)
    """Runs that one launcher trains at a time."""
    max_probes: int = Field(default=1, ge=1, le=64)
    """Probes that one launcher works on at a time."""
    max_queued: int = Field(default=1000, ge=1)
    """Waiting runs, and waiting probes, above which new ones are refused."""
    sweep_s: float = Field(default=0.5, gt=0, le=60)
    """Pause between two looks of the launcher at requests and children."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of a crashed train process in a row without a new checkpoint in between."""
    grace_s: float = Field(default=20.0, gt=0)
    """Time that a stopping child gets for its checkpoint before it is killed."""
    rank_timeout_s: float = Field(default=600.0, gt=0)
    """A step that misses a rank for so long ends the process with an error."""
    heartbeat: Path | None = None
    """File that the launcher touches every second, for health checks."""
    max_body_bytes: int = Field(default=64 << 10, ge=1024)
    """Cap on a request body."""

    @property
    def metrics_ports_of_runs(self) -> range:
        """Ports at which train processes answer Prometheus: one takes the first free one."""
        return self.metrics_ports(1, self.max_runs * self.processes_per_run)

    @property
    def metrics_ports_of_probes(self) -> range:
        """Ports at which probes do."""
        return self.metrics_ports(1 + self.max_runs * self.processes_per_run, self.max_probes)
