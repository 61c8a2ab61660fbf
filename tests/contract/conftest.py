"""The writing side of the contract: the generator's real job, with a model without weights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.dataset_files import DatasetFiles
from synthrep_generator.intake import BatchHeader, IntakeReader, write_batch
from synthrep_generator.jobs import Bench, JobResult, generate_shard, make_request
from synthrep_generator.settings import ModelConfig
from synthrep_generator.synthesis import FakeSynthesizer
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.storage import DatasetPaths

STORE_PX = 16


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
