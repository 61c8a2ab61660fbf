"""From the commit of a shard to the first bytes of an image in a trainer that waits."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles

from benchmarks.datasets import accept_prompts, plain_settings, wait_for_groups
from benchmarks.harness import Dose, Measured, case
from benchmarks.services import Services
from benchmarks.uploads import captions
from synthrep_generator.queues import WorkQueue
from synthrep_shared.commit_log import LogReader
from synthrep_shared.storage import DatasetPaths

_IMAGES = 10
_IMAGE_S = 0.015
_PEER_POLL_S = 1.0
_FIRST_BYTES = 512


@case(
    "commit to first bytes at a waiting trainer, p95",
    unit="ms",
    peer="a reader that looks once a second",
    higher_is_better=False,
    max_value=10.0,
)
def commit_to_first_bytes(dose: Dose) -> Measured:
    """Both wait for the same shards of a real worker, ten images in 0.15 s each.

    Ours is the trainer's stream, which verifies the shard, journals the admission and draws before
    it reads; the peer opens the file. The clock starts with the record's time stamp, before its
    line is flushed.
    """
    shards = dose.size(150, 30)
    with tempfile.TemporaryDirectory() as folder, Services(
        Path(folder), workers=1, api=False, synthesizer="fake", device="cpu",
        fake_delay_s=_IMAGE_S, job_images=_IMAGES,
    ) as services:  # fmt: skip
        paths = DatasetPaths(services.settings.root, "latency")
        paths.make_folders()
        readers = (_Trainer(paths, Path(folder) / "run", shards), _Poller(paths, shards))
        for reader in readers:
            reader.start()
        settings = plain_settings(services.settings.models["tiny"], images_per_prompt=_IMAGES)
        accept_prompts(paths, list(captions(shards)), settings)
        WorkQueue(services.settings).nudge()
        records = wait_for_groups(services, paths, shards)
        for reader in readers:
            reader.join(60)
    committed_at = [record.created_at.timestamp() for record in records]
    ours, peer = (_p95_ms(reader.seen_at, committed_at) for reader in readers)
    return Measured(ours, peer, 1, f"{shards} shards")


class _Trainer(threading.Thread):
    """Draws one image of each group from the trainer's own stream."""

    def __init__(self, paths: DatasetPaths, run: Path, shards: int) -> None:
        super().__init__(daemon=True)
        self._paths, self._run, self._shards = paths, run, shards
        self.seen_at: list[float] = []

    def run(self) -> None:
        """Until every shard was seen."""
        from synthrep_trainer.order import SamplingPlan
        from synthrep_trainer.settings import TrainerSettings
        from synthrep_trainer.shard_stream import ShardStream

        plan = SamplingPlan(
            seed=0, captions_per_batch=1, images_per_caption=_IMAGES,
            min_fill_groups=1, max_uses_per_image=1,
        )  # fmt: skip
        self._run.mkdir()
        poll_s = TrainerSettings.model_fields["poll_s"].default
        stream = ShardStream(self._paths, self._run, plan, poll_s=poll_s)
        while len(self.seen_at) < self._shards:
            batch = stream.next_batch(lambda: False)
            if batch is None:
                return
            (group,) = batch.groups
            stream.store.read(group.shard, group.place, [0])
            self.seen_at.append(time.time())


class _Poller(threading.Thread):
    """Looks at the log once a second and reads the first bytes of what is new."""

    def __init__(self, paths: DatasetPaths, shards: int) -> None:
        super().__init__(daemon=True)
        self._paths, self._shards = paths, shards
        self.seen_at: list[float] = []

    def run(self) -> None:
        """Until every shard was seen."""
        reader = LogReader(self._paths.log)
        while len(self.seen_at) < self._shards:
            for record in reader.poll():
                with (self._paths.shards / record.name).open("rb") as stream:
                    stream.read(_FIRST_BYTES)
                self.seen_at.append(time.time())
            time.sleep(_PEER_POLL_S)


def _p95_ms(seen_at: list[float], committed_at: list[float]) -> float:
    delays = [seen - committed for seen, committed in zip(seen_at, committed_at, strict=True)]
    return 1e3 * quantiles(delays, n=20, method="inclusive")[-1]
