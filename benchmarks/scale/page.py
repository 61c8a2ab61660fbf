"""What the page costs over a long log: viewers who keep it open, and a browser among them.

The data set has so many captions in its log, and a worker with painted images adds a shard about
every second; a run's numbers grow as fast, and its map is as large as maps get. Measured are the
time in which the trainer's API makes everything that an open page shows, how long after its commit
a group is on its way to a viewer, and the memory of the browser's tab.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import httpx

from benchmarks.scale.clients import latency
from benchmarks.scale.made_logs import make_dataset
from benchmarks.scale.page_viewers import Viewer, open_tab
from benchmarks.scale.upload import resident_bytes
from benchmarks.scale.usage import short
from benchmarks.services import Services
from synthrep_cli.stack import free_port
from synthrep_shared.commit_log import LogReader
from synthrep_shared.messages import RunRequest
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer.feature_maps import FeatureMap, MappedGroup, MappedImage, write_feature_map
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.page.sections import PARTS
from synthrep_trainer.runs import RunFolder, Workplace

DATASET = "made"
_START_S = 120.0
_WARM_S = 20.0
_STEP_S, _PASS_PAUSE_S = 0.25, 0.5
_NEW_CAPTIONS, _JOB_IMAGES, _IMAGE_DELAY_S = 600, 40, 0.025
_MAP_IMAGES, _NEIGHBOURS = 2000, 8
_PAST_STEPS = 5000


def measure_page(
    captions: int, viewers: int, *, warm_s: float = _WARM_S, measured_s: float = 60.0
) -> dict[str, Any]:
    """Make a data set of so many captions, and look at it with so many viewers and a browser."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = DatasetPaths(folder / "root", DATASET)
        make_dataset(paths, captions, has_files=False)
        model = {"path": "absent", "generate_px": 32, "store_px": 32, "device_batch_images": 10}
        services = Services(
            folder / "services",
            workers=1,
            root=str(folder / "root"),
            synthesizer="fake",
            fake_delay_s=_IMAGE_DELAY_S,
            models={"tiny": model},
            job_images=_JOB_IMAGES,
        )
        with services, _trainer(folder, services.url) as (url, trainer), _training(folder):
            before_cpu_s = _cpu_s(trainer)
            found = _look(url, services, paths, viewers, warm_s=warm_s, measured_s=measured_s)
            found["trainer_cores"] = short((_cpu_s(trainer) - before_cpu_s) / found.pop("seconds"))
            found["trainer_mb"] = short(resident_bytes(trainer) / 1e6)
    return {"captions": captions, "viewers": viewers, **found}


def _look(
    url: str, services: Services, paths: DatasetPaths, viewers: int, *, warm_s: float,
    measured_s: float,
) -> dict[str, Any]:  # fmt: skip
    started = time.monotonic()
    reader = LogReader(paths.log)
    while reader.poll():
        pass
    crowd = [Viewer(url) for _ in range(viewers)]
    for viewer in crowd:
        viewer.start()
    body = {
        "dataset": DATASET,
        "images_per_prompt": 10,
        "prompts": [f"a new picture of line {line}" for line in range(_NEW_CAPTIONS)],
    }
    httpx.post(f"{services.url}/v1/batches", json=body, timeout=60).raise_for_status()
    with open_tab(url) as tab, httpx.Client(base_url=url, timeout=60) as client:
        _passes(client, warm_s)
        tab.begin()
        by_part = _passes(client, measured_s)
        in_browser = tab.end()
    for viewer in crowd:
        viewer.stop()
    delays = lags(reader, crowd)
    if not delays:
        raise RuntimeError("no new group reached a viewer")
    return {
        "seconds": time.monotonic() - started,
        "update": asdict(latency([ms for times in by_part.values() for ms in times])),
        "whole_page": asdict(
            latency([sum(times) for times in zip(*by_part.values(), strict=True)])
        ),
        "parts_p50_ms": {name: latency(times).p50_ms for name, times in by_part.items()},
        "commit_to_viewer": asdict(latency(delays)),
        "events_of_a_viewer": crowd[0].events,
        "mb_to_a_viewer": short(crowd[0].num_bytes / 1e6),
        **in_browser,
    }


def _passes(client: httpx.Client, seconds: float) -> dict[str, list[float]]:
    """Everything that an open page shows, made again and again: milliseconds by part."""
    by_part: dict[str, list[float]] = {name: [] for name in PARTS}
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        for name, times in by_part.items():
            started = time.perf_counter()
            client.get(f"/page/parts/{name}").raise_for_status()
            times.append(1e3 * (time.perf_counter() - started))
        time.sleep(_PASS_PAUSE_S)
    return by_part


def lags(reader: LogReader, crowd: list[Viewer]) -> list[float]:
    """Milliseconds from each new commit to each viewer who was shown a group of it."""
    found = []
    while records := reader.poll():
        for record in records:
            gids = [group.gid for group in record.groups]
            for viewer in crowd:
                times = [viewer.seen[gid] for gid in gids if gid in viewer.seen]
                if times:
                    found.append(1e3 * (min(times) - record.created_at.timestamp()))
    return found


@contextmanager
def _trainer(folder: Path, generator_url: str) -> Iterator[tuple[str, int]]:
    """The trainer's API as a process of its own: its address and its id."""
    port = free_port()
    environment = {
        "SYNTHREP_TRAINER_ROOT": str(folder / "root"),
        "SYNTHREP_TRAINER_RUNS": str(folder / "trainer"),
        "SYNTHREP_TRAINER_PORT": str(port),
        "SYNTHREP_TRAINER_GENERATOR_URL": generator_url,
    }
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "synthrep_trainer.api"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_ready(url)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{url} is not ready after {_START_S:.0f} s")


@contextmanager
def _training(folder: Path) -> Iterator[None]:
    """A run with a past and a map, whose numbers grow."""
    place = Workplace(folder / "trainer")
    run = place.submit_run(RunRequest(dataset=DATASET, max_steps=10 * _PAST_STEPS))
    write_feature_map(run.path, _largest_map())
    ended = threading.Event()
    thread = threading.Thread(target=_take_steps, args=(run, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take_steps(run: RunFolder, ended: threading.Event) -> None:
    writer = MetricsWriter(run.metrics, step=0)
    step = 0
    while step < _PAST_STEPS or not ended.wait(_STEP_S):
        step += 1
        writer.write(
            StepMetrics(
                step=step, time=datetime.now(UTC), loss=5 / step**0.1, lr=1e-3, gradient_norm=1,
                effective_rank=step**0.5 if step % 10 == 0 else None, images_seen=256 * step,
                images_per_s=900, wait_s=0, images_committed=10**7, generated_per_trained=1,
                shards_quarantined=0,
            )
        )  # fmt: skip
    writer.close()


def _largest_map() -> FeatureMap:
    dice, per_group = Random(0), 4
    count = _MAP_IMAGES // per_group
    return FeatureMap(
        dataset=DATASET,
        step=_PAST_STEPS,
        checkpoint="0" * 64,
        shares=(0.2, 0.1),
        neighbour_accuracy=0.5,
        groups=tuple(
            MappedGroup(gid=f"{k:032x}", caption=f"a photo of line {k}", is_held_out=False)
            for k in range(count)
        ),
        images=tuple(
            MappedImage(
                group=k // per_group,
                image=k % per_group,
                x=round(dice.gauss(0, 1), 4),
                y=round(dice.gauss(0, 1), 4),
                nearest=tuple((dice.randrange(_MAP_IMAGES), 0.5) for _ in range(_NEIGHBOURS)),
            )
            for k in range(_MAP_IMAGES)
        ),
    )


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
