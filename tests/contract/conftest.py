"""Both sides of the contract: the generator's real job without weights, and both APIs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import synthrep_generator.api
import synthrep_trainer.api
from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.dataset_files import DatasetFiles
from synthrep_generator.intake import BatchHeader, IntakeReader, write_batch
from synthrep_generator.jobs import Bench, JobResult, generate_shard, make_request
from synthrep_generator.queues import QueueView, WorkerView
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_generator.synthesis import FakeSynthesizer
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings

STORE_PX = 16
KEY = "a key of both services"


class _IdleWatch:
    def begin(self, places: Sequence[Place]) -> None:
        """Nobody looks."""

    def step(self) -> None:
        """Nobody looks."""


class ShardFactory:
    """Accepts batches of one data set, and runs the job that makes a shard of a batch."""

    store_px = STORE_PX

    def __init__(self, root: Path, dataset: str = "birds") -> None:
        self.paths = DatasetPaths(root, dataset)
        self.paths.make_folders()
        self.files = DatasetFiles(self.paths)

    def accept(
        self, prompts: Sequence[str], *, batch: str, images: int = 3, seed: int | None = None
    ) -> BatchHeader:
        """Make a batch durable."""
        header = BatchHeader(
            id=batch,
            dataset=self.paths.dataset,
            owner="",
            priority=5,
            num_prompts=len(prompts),
            settings=GenerationSettings(
                images_per_prompt=images,
                guidance_scale=2.5,
                num_inference_steps=7,
                scheduler="dpm++",
                negative_prompt="blurry",
                seed=seed,
            ),
            body_sha256="",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        assert write_batch(self.paths, header, prompts)
        return header

    def generate(self, batch: str) -> JobResult:
        """Run one job over every prompt of an accepted batch."""
        count = IntakeReader(self.paths, batch).header.num_prompts
        places = [Place(batch, index) for index in range(count)]
        request = make_request(chunk_from_places(self.paths.dataset, places), self.files)
        assert request is not None
        model = ModelConfig(
            path=Path("absent"), generate_px=STORE_PX, store_px=STORE_PX, device_batch_images=4
        )
        synthesizer = FakeSynthesizer(store_px=STORE_PX)
        return generate_shard(request, Bench(synthesizer, model, "jpg", 95, _IdleWatch()))


@pytest.fixture
def factory(tmp_path: Path) -> ShardFactory:
    """Writes the data set `birds` under `tmp_path / "data"`."""
    return ShardFactory(tmp_path / "data")


class OneWorker:
    """A queue without jobs and a worker that waits for one."""

    def queue_view(self) -> QueueView:
        return QueueView(depth=0, running=0)

    def running_prompts(self) -> dict[str, int]:
        return {}

    def workers(self) -> list[WorkerView]:
        return [WorkerView("w0", "cpu", "idle", 2.5)]

    def nudge(self) -> None:
        """Nobody sleeps."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "runs")


@pytest.fixture
def apps(root: Path, place: Workplace) -> dict[str, Any]:
    """Both services, by host name."""
    generator = GeneratorSettings.model_validate(
        {"root": root, "reserve_bytes": 0, "api_keys": [KEY]}
    )
    trainer = TrainerSettings.model_validate(
        {"root": root, "runs": place.root, "api_keys": [KEY], "probe_folder_roots": [root.parent]}
    )
    return {
        "generator": synthrep_generator.api.create_app(generator, OneWorker()),
        "trainer": synthrep_trainer.api.create_app(trainer),
    }
