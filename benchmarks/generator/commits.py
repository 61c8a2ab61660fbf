"""From the sealing of a shard to the first bytes of an image in a trainer that waits."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles

from benchmarks.datasets import seal_shard
from benchmarks.harness import Dose, Measured, case
from synthrep_generator.shard_writer import Member
from synthrep_shared.commit_log import CommitLog, LogReader
from synthrep_shared.storage import DatasetPaths

_IMAGES = 160  # of 4 KB: a job of the tiny model
_IMAGE_BYTES = 4 << 10
_PEER_POLL_S = 1.0


@case(
    "seal to the first bytes at a waiting trainer, p95",
    unit="ms",
    peer="a reader that looks once a second",
    higher_is_better=False,
    max_value=10.0,
)
def seal_to_first_bytes(dose: Dose) -> Measured:
    """Both readers wait for the same shards. Ours is the trainer's stream: it verifies the shard,
    journals the admission, draws, and reads; the peer only opens the file."""
    shards = dose.size(100, 20)
    with tempfile.TemporaryDirectory() as folder:
        paths = DatasetPaths(Path(folder), "latency")
        paths.make_folders()
        ours = _Trainer(paths, Path(folder) / "run", shards)
        peer = _Poller(paths, shards)
        for thread in (ours, peer):
            thread.start()
        sealed_at = _seal_now_and_then(paths, shards)
        for thread in (ours, peer):
            thread.join(60)
    return Measured(
        _p95_ms(ours.seen_at, sealed_at), _p95_ms(peer.seen_at, sealed_at), 1, f"{shards} shards"
    )


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
            self.seen_at.append(time.monotonic())


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
                    stream.read(_IMAGE_BYTES)
                self.seen_at.append(time.monotonic())
            time.sleep(_PEER_POLL_S)


def _seal_now_and_then(paths: DatasetPaths, shards: int) -> list[float]:
    log, dice = CommitLog(paths.log), random.Random(0)
    sealed_at = []
    for number in range(shards):
        time.sleep(dice.uniform(0.05, 0.25))
        gid = f"{number:032x}"
        seal_shard(paths, log, gid, _members(gid, dice))
        sealed_at.append(time.monotonic())
    return sealed_at


def _members(gid: str, dice: random.Random) -> list[Member]:
    members: list[Member] = []
    for k in range(_IMAGES):
        members += [(f"{gid}-{k}.jpg", dice.randbytes(_IMAGE_BYTES)), (f"{gid}-{k}.json", b"{}")]
    return members


def _p95_ms(seen_at: list[float], sealed_at: list[float]) -> float:
    """Of the delays; a reader may see a line before the writer's call returns."""
    delays = [max(0.0, seen - sealed) for seen, sealed in zip(seen_at, sealed_at, strict=True)]
    return 1e3 * quantiles(delays, n=20, method="inclusive")[-1]
