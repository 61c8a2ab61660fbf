"""One campaign: start, load, faults at random times, quiet, verdict."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from synthrep_shared.commit_log import LogReader
from synthrep_shared.errors import CommitLogError
from synthrep_shared.failpoints import NAMES as FAILPOINTS
from synthrep_shared.storage import DatasetPaths
from tests.chaos.disk import Disk
from tests.chaos.failpoints import Failpoints
from tests.chaos.faults import Faults
from tests.chaos.load import DATASETS, Load
from tests.chaos.services import NAMES, Services, kind_of
from tests.chaos.verdict import Verdict, judge

PROMPTS_PER_FAULT = 5
MIN_POISON = 5
_TICK_S = 0.05
_REPORT_S = 5.0
_START_LIMIT_S = 120.0
_AIM_S = 0.5  # a chunk's run takes about as long
_RECOVERY_S = 5.0  # at most so long, a fault waits until the one before it was got over
_QUIET_LIMIT_S = 60.0  # without any outcome for so long, what is undecided is lost
_REARM_S = 3.0


def say(text: str) -> None:
    """A line to the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Campaign:
    """`run` gives the verdict; `close` ends every process and unmounts the disk."""

    def __init__(
        self,
        folder: Path,
        *,
        num_faults: int,
        seed: int,
        kinds: Sequence[str] = (),
        mutation: str | None = None,
    ) -> None:
        self._folder, self._num_faults, self._rng = folder, num_faults, random.Random(seed)
        self._disk = Disk(folder / "data", size_bytes=(64 << 20) + num_faults * (512 << 10))
        self._failpoints = Failpoints(folder / "failpoints", self._rng)
        root = self._disk.folder
        self._services = Services(folder, root, self._failpoints, mutation=mutation)
        self._datasets = [DatasetPaths(root, name) for name in DATASETS]
        self._faults = Faults(self._services, self._disk, self._datasets, self._rng)
        self._plan = self._faults.plan(num_faults, kinds)
        self._progress = _Progress(self._datasets)
        url = f"http://127.0.0.1:{self._services.api_port}"
        load_rng = random.Random(f"load {seed}")
        self._load = Load(url, load_rng, lambda accepted: accepted - self._progress.decided)
        self._started_at = self._reported_at = time.monotonic()
        self._injected: Counter[str] = Counter()

    def run(self) -> Verdict:
        """Inject the faults, wait until everything is decided or nothing moves, and judge."""
        route = "a small tmpfs" if self._disk.is_small else "file size limits only (no mount here)"
        say(f"data in {self._disk.folder}; full disk by {route}")
        self._load.start()
        self._wait(lambda: self._progress.decided > 0, _START_LIMIT_S)
        for name in self._plan:
            self._strike(name)
        self._reach_failpoints()
        self._settle()
        self._services.stop()
        say(f"faults: {_listed(self._injected)}")
        say(f"answers: {_listed(self._load.answers)}")
        say(f"exits: {_listed(self._services.exits)}")
        verdict = judge(self._disk.folder, DATASETS, self._load.receipts)
        say(f"{verdict.images} images verified, {verdict.leftovers} leftovers that nobody reads")
        return verdict

    def summary(self, verdict: Verdict) -> str:
        """The last line."""
        return (
            f"lost={verdict.lost} duplicated={verdict.duplicated} bad={verdict.bad} "
            f"innocent={verdict.innocent} faults={self._injected.total()} "
            f"accepted={verdict.accepted} committed={verdict.committed} failed={verdict.failed} "
            f"poison={verdict.poison_failed}/{verdict.poison} "
            f"failpoints={len(self._failpoints.reached())}/{len(FAILPOINTS)}"
        )

    def is_green(self, verdict: Verdict) -> bool:
        """Whether every promise was kept, and the campaign was one that could show otherwise."""
        faults = self._injected.total()
        return (
            verdict.lost == verdict.duplicated == verdict.bad == verdict.innocent == 0
            and verdict.accepted == verdict.committed + verdict.failed
            and verdict.accepted >= PROMPTS_PER_FAULT * faults
            and verdict.poison_failed == verdict.poison >= MIN_POISON
            and not self._failpoints.missing()
        )

    def keep_evidence(self) -> Path:
        """Copy the data off the disk that is about to go; returns where to."""
        evidence = self._folder / "evidence"
        shutil.copytree(self._disk.folder, evidence)
        return evidence

    def close(self) -> None:
        """End what runs."""
        self._services.stop()
        self._disk.close()

    def _strike(self, name: str) -> None:
        """One fault, once the effects of the one before have let an outcome through."""
        decided = self._progress.decided
        self._wait(lambda: self._progress.decided > decided, _RECOVERY_S)
        if "redis" in name:
            self._wait(self._services.is_redis_up, _RECOVERY_S)
        self._load.burst()
        self._wait(lambda: False, self._rng.uniform(0, _AIM_S))
        self._wait(self._services.busy_workers, _RECOVERY_S)
        while not self._faults.inject(name):
            self._wait(lambda: False, _TICK_S)
        self._injected[name] += 1
        self._report(name)

    def _reach_failpoints(self) -> None:
        """Go on under load, restarting what carries a name that is done, until none is missing."""
        missing, moved_at = self._failpoints.missing(), time.monotonic()
        while missing and time.monotonic() - moved_at < _QUIET_LIMIT_S:
            say(f"failpoints missing: {', '.join(sorted(missing))}")
            for name in NAMES:
                if self._failpoints.idle(name, kind_of(name)):
                    self._faults.kill(name)
            self._load.burst()
            self._wait(lambda: not self._failpoints.missing(), _REARM_S)
            if self._failpoints.missing() != missing:
                missing, moved_at = self._failpoints.missing(), time.monotonic()

    def _settle(self) -> None:
        """No more faults; prompts until there are enough; then wait for the last outcome."""
        self._faults.undo(everything=True)
        enough = PROMPTS_PER_FAULT * self._num_faults
        self._wait(lambda: self._load.accepted >= enough, _QUIET_LIMIT_S + enough)
        self._load.finish()
        self._wait(lambda: not self._load.is_alive(), _QUIET_LIMIT_S)
        while self._progress.decided < self._load.accepted:
            if not self._wait(self._progress.has_moved, _QUIET_LIMIT_S):
                say(f"no outcome for {_QUIET_LIMIT_S:.0f} s")
                break

    def _wait(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Tend the services until the condition holds; whether it came to hold."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._services.tend()
            self._faults.undo()
            self._progress.refresh()
            if self._load.error is not None:
                raise RuntimeError(f"the load failed: {self._load.error}")
            if time.monotonic() - self._reported_at > _REPORT_S:
                self._report()
            if condition():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK_S)

    def _report(self, event: str = "") -> None:
        self._reported_at = time.monotonic()
        say(
            f"{self._reported_at - self._started_at:6.1f} s  "
            f"faults {self._injected.total()}/{self._num_faults}  "
            f"accepted {self._load.accepted}  decided {self._progress.decided}  "
            f"failpoints {len(self._failpoints.reached())}/{len(FAILPOINTS)}  {event}"
        )


class _Progress:
    """Counts prompts as the logs gain outcomes."""

    def __init__(self, datasets: list[DatasetPaths]) -> None:
        self._readers = {paths.dataset: LogReader(paths.log) for paths in datasets}
        self._decided: set[tuple[str, int]] = set()
        self._seen = 0

    @property
    def decided(self) -> int:
        """Prompts with an outcome."""
        return len(self._decided)

    def refresh(self) -> None:
        """Read what is new."""
        for reader in self._readers.values():
            try:
                while records := reader.poll():
                    for record in records:
                        self._decided |= {(ref.batch, ref.index) for ref in record.groups}
            except CommitLogError:
                continue  # the verdict will tell

    def has_moved(self) -> bool:
        """Whether there are more outcomes than at the last call."""
        before, self._seen = self._seen, self.decided
        return self._seen > before


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
