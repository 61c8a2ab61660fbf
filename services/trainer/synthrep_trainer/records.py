"""The small JSON files of runs and probes; `runs` says who writes them, and where."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from synthrep_shared.keys import ANONYMOUS
from synthrep_shared.messages import ProbeRequest, RunRequest, State


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunRecord(_Record):
    """`request.json` of a run, and what follows from it."""

    id: str
    request: RunRequest
    owner: str = ANONYMOUS
    created_at: datetime

    @property
    def images_per_caption(self) -> int:
        """Stored images that one use of a caption takes."""
        default = 1 if self.request.objective in ("simclr", "clip") else 4
        return self.request.images_per_caption or default

    @property
    def views_per_image(self) -> int:
        """Crops of each drawn image that are views in their own right."""
        return 2 if self.request.objective == "simclr" else 1

    @property
    def reads_captions(self) -> bool:
        """Whether the text of captions is trained on."""
        return self.request.objective in ("clip", "stablerep+")

    @property
    def small_crops_per_image(self) -> int:
        """Small crops of each drawn image, beside its views."""
        return self.request.synclr.crops_per_image if self.request.objective == "synclr" else 0

    @property
    def held_out(self) -> float:
        """Share of captions that are not trained on."""
        return self.request.knn_held_out if self.request.knn_every else 0.0

    @property
    def views_per_step(self) -> int:
        """Image views that one step trains on, over all ranks."""
        return self.request.captions_per_batch * self.images_per_caption * self.views_per_image

    @property
    def max_steps(self) -> int:
        """The step that completes the run."""
        if self.request.max_steps is not None:
            return self.request.max_steps
        assert self.request.max_images is not None
        return -(-self.request.max_images // self.views_per_step)


class ProbeRecord(_Record):
    """`request.json` of a probe."""

    id: str
    request: ProbeRequest
    owner: str = ANONYMOUS
    created_at: datetime


class Wanted(_Record):
    """`wanted.json`: what the user wants, and the number of the attempt that is to do it."""

    verb: Literal["run", "stop"] = "run"
    attempt: int = 1


class Status(_Record):
    """`status.json`: the launcher's answer to attempt `attempt`."""

    state: State
    attempt: int = 1
    error: str | None = None


class Failure(_Record):
    """`failure.json`: what a process said when it failed, and whether trying again can help."""

    error: str
    is_permanent: bool
