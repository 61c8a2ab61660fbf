"""What goes wrong: each fault is done at once and, where it lasts, undone at its time.

Several may overlap. A fault of a worker hits one that holds a chunk, where there is one.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import redis

from synthrep_generator.queues import SOCKET_TIMEOUT_S
from synthrep_shared.storage import DatasetPaths
from tests.chaos.disk import Disk
from tests.chaos.services import HANG_S, LEASE_S, NAMES, RECONCILERS, WORKERS, Services

_OFTEN = ("zombie-worker", "zombie-worker")  # two workers do the same then
KILL_ALL_WORKERS = "kill-all-workers"
_ZOMBIE_S = 2.5 * LEASE_S  # others have time to take the work and to do it
_WAKE_S = 0.1
_TORN_LINE = b'{"version":1,"seq":'
_FOREVER = resource.RLIM_INFINITY
_QUOTAS = (0, 700, 5000)  # bytes of a file: nothing, part of a small file, part of a shard


class Faults:
    """The faults by name; each says whether it hit something."""

    def __init__(
        self, services: Services, disk: Disk, datasets: list[DatasetPaths], rng: random.Random
    ) -> None:
        self._services, self._disk, self._datasets, self._rng = services, disk, datasets, rng
        self._order = count()
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._stopped: set[str] = set()
        self._by_name: dict[str, Callable[[], bool]] = {
            "kill-worker": lambda: self.kill(self._busy()),
            "kill-device": lambda: self._signal_device(signal.SIGKILL),
            "kill-reconciler": lambda: self.kill(self._any(RECONCILERS)),
            "kill-api": lambda: self.kill("api"),
            "kill-redis": lambda: self.kill("redis"),
            "wipe-redis": self._wipe_redis,
            "flush-redis": self._flush_redis,
            "stop-redis": self._stop_redis,
            "stall-redis": lambda: self._stall("redis", rng.uniform(0.5, 1.5 * SOCKET_TIMEOUT_S)),
            "stall-api": lambda: self._stall("api", rng.uniform(0.5, 3)),
            "zombie-worker": lambda: self._stall(self._busy(), _ZOMBIE_S),
            "zombie-reconciler": lambda: self._stall(self._any(RECONCILERS), _ZOMBIE_S),
            "hang-device": lambda: self._signal_device(signal.SIGSTOP),
            "end-worker": lambda: services.signal(self._busy(), signal.SIGTERM),
            "torn-line": self._tear_a_line,
            "quota": self._set_quota,
        }
        if disk.is_small:
            self._by_name["full-disk"] = self._fill_disk

    def plan(self, num_faults: int, kinds: Sequence[str]) -> list[str]:
        """So many names in random order, from decks that hold each; all workers die at the end.

        `kinds` are the names to take, all if there are none; raises ValueError for an unknown one.
        """
        if unknown := set(kinds) - self._by_name.keys():
            raise ValueError(f"no such faults: {unknown}; known: {sorted(self._by_name)}")
        deck = list(kinds) or [*sorted(self._by_name), *_OFTEN]
        plan: list[str] = []
        while len(plan) < num_faults - 1:
            plan += self._rng.sample(deck, len(deck))
        return [*plan[: num_faults - 1], KILL_ALL_WORKERS]

    def inject(self, name: str) -> bool:
        """Make it go wrong; False if there was nothing to hit just now."""
        if name == KILL_ALL_WORKERS:
            killed = [self.kill(worker) for worker in WORKERS]
            return any(killed)
        return self._by_name[name]()

    def undo(self, *, everything: bool = False) -> None:
        """End the faults whose time is over, or all."""
        while self._later and (everything or self._later[0][0] <= time.monotonic()):
            heapq.heappop(self._later)[2]()

    def kill(self, name: str) -> bool:
        """Kill a service, and what dies with it."""
        return self._services.signal(name, signal.SIGKILL)

    def _after(self, seconds: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))

    def _any(self, names: tuple[str, ...]) -> str:
        live = self._services.live(names) or list(names)
        return self._rng.choice([n for n in live if n not in self._stopped] or live)

    def _busy(self) -> str:
        busy = [n for n in self._services.busy_workers() if n not in self._stopped]
        return self._rng.choice(busy) if busy else self._any(WORKERS)

    def _signal_device(self, number: signal.Signals) -> bool:
        devices = self._services.pids(self._busy())[1:]
        self._after(2 * HANG_S, lambda: _signal_all(devices, signal.SIGCONT))
        return _signal_all(devices, number)

    def _wipe_redis(self) -> bool:
        self._services.hold("redis")

        def come_back_empty() -> None:
            self._services.forget_redis()
            self._services.release("redis")

        self._after(self._rng.uniform(0.1, 1), come_back_empty)
        return self.kill("redis")

    def _flush_redis(self) -> bool:
        try:
            return bool(self._services.redis.flushall())
        except redis.RedisError:
            return False

    def _stop_redis(self) -> bool:
        self._services.hold("redis")
        self._after(self._rng.uniform(1, 4), lambda: self._services.release("redis"))
        return self._services.signal("redis", signal.SIGTERM)

    def _stall(self, name: str, seconds: float) -> bool:
        pids = self._services.pids(name)
        self._stopped.add(name)

        def go_on() -> None:
            self._stopped.discard(name)
            # Children first: a parent that wakes alone finds them hung, and kills them.
            for pid in reversed(pids):
                _signal_all([pid], signal.SIGCONT)
                time.sleep(_WAKE_S)

        self._after(seconds, go_on)
        return _signal_all(pids, signal.SIGSTOP)

    def _tear_a_line(self) -> bool:
        """What a host leaves that loses power in the middle of a log line."""
        logs = [paths.log for paths in self._datasets if paths.log.exists()]
        if not logs or not self.kill(self._busy()):
            return False
        log = self._rng.choice(logs)
        with _log_lock(log.parent / "lock") as is_held:
            if is_held:
                with log.open("ab") as stream, contextlib.suppress(OSError):
                    stream.write(_TORN_LINE)
        return True

    def _fill_disk(self) -> bool:
        self._disk.fill(left_bytes=self._rng.choice((0, 0, 8192)))
        self._after(self._rng.uniform(0.5, 2.5), self._disk.empty)
        return True

    def _set_quota(self) -> bool:
        self._after(self._rng.uniform(0.5, 2.5), lambda: self._limit_files(_FOREVER))
        return self._limit_files(self._rng.choice(_QUOTAS))

    def _limit_files(self, limit_bytes: int) -> bool:
        """Writes past the limit fail or fall short, as under a quota of the file system."""
        pids = [pid for name in NAMES if name != "redis" for pid in self._services.pids(name)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, _FOREVER))
        return bool(pids)


@contextlib.contextmanager
def _log_lock(path: Path) -> Iterator[bool]:
    """Holds the log's lock; gives False if it cannot, as a stopped process has it."""
    with path.open("r+") as lock:
        for _ in range(20):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                yield True
                return
        yield False


def _signal_all(pids: list[int], number: signal.Signals) -> bool:
    """Whether one of them was there."""
    is_hit = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            is_hit = True
    return is_hit
