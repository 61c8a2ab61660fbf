"""All services as child processes of this one: started in order, watched, stopped together.

Each child has its own session (so that a terminal's Ctrl-C reaches only this process), dies with
this process (parent-death signal), and logs to a file of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from redis import Redis, RedisError

from synthrep_cli.child_signals import (
    INTERRUPTS,
    interrupts_held_back,
    interrupts_ignored,
    prepare_child,
    signal_group,
)
from synthrep_shared.client import SynthRep
from synthrep_shared.errors import SynthRepError

PID_FILE = "stack.pid"
"""Lies in the folder of a stack while it runs: whom `make down` tells to stop."""

_START_LIMIT_S = 180.0
_STOP_LIMIT_S = 30.0
_POLL_S = 0.25
_REDIS_S = 5.0
_LAST_WORDS_BYTES = 2000


class StackError(SynthRepError):
    """A service did not start or died; the message carries its last words."""


@dataclass(frozen=True)
class StackConfig:
    """What to start, and where it keeps its files."""

    folder: Path
    workers: int = 1
    redis_url: str | None = None
    generator_port: int = 0
    trainer_port: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them: a launcher for each, workers by turns; none: one launcher
    that sees whatever there is."""

    @property
    def data(self) -> Path:
        """Root of the datasets."""
        return self.folder / "data"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Make the folder and keep other stacks out of it.

    Raises:
        StackError: another has it; two would write the same logs and the same Valkey.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"{folder} is in use by other services; name another") from None
        (folder / PID_FILE).write_text(str(os.getpid()))
        try:
            yield
        finally:
            (folder / PID_FILE).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Stack:
    """The running services; `with Stack(config) as stack` stops every one on the way out."""

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = config.folder / "logs"
        self._generator_port = config.generator_port or free_port()
        self._trainer_port = config.trainer_port or free_port()
        self._redis_port = free_port()
        self.generator_url = f"http://127.0.0.1:{self._generator_port}"
        self.trainer_url = f"http://127.0.0.1:{self._trainer_port}"

    def __enter__(self) -> Stack:
        for port in (self._generator_port, self._trainer_port):
            _expect_free(port)
        if self.config.redis_url is not None:
            _expect_redis(self.config.redis_url)
        # Explicit: a shell's background job inherits an ignored SIGINT, and SIGTERM must stop too.
        for number in INTERRUPTS:
            signal.signal(number, signal.default_int_handler)
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self) -> SynthRep:
        """A client of both services."""
        return SynthRep(self.generator_url, self.trainer_url)

    def check(self) -> None:
        """Raise StackError if a child has died."""
        for name, child in self._children.items():
            if child.poll() is not None:
                raise StackError(
                    f"{name} ended with code {child.returncode}. Its last words:\n"
                    f"{self._last_words(name)}"
                )

    def wait_ready(self, tell: Callable[[str], object] = lambda text: None) -> None:
        """Block until both APIs, and a worker where there is to be one, are ready.

        `tell` is told what is waited for. Raises StackError past the limit.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        told: list[str] = []
        with httpx.Client(timeout=2) as http:
            while missing := self._missing(http):
                self.check()
                names = ", ".join(missing)
                if time.monotonic() > deadline:
                    limit = f"{_START_LIMIT_S:.0f} s"
                    raise StackError(f"{names} not ready after {limit}; see {self._logs}")
                if missing != told:
                    tell(f"waiting for {names} …")
                    told = missing
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop every child: SIGTERM in reverse order of start, SIGKILL past the limit."""
        with interrupts_ignored():
            children = list(reversed(self._children.items()))
            redis = [c for c in children if c[0] == "redis"]
            for group in ([c for c in children if c[0] != "redis"], redis):
                for _, child in group:
                    signal_group(child, signal.SIGTERM)
                deadline = time.monotonic() + _STOP_LIMIT_S
                for _, child in group:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(max(0.1, deadline - time.monotonic()))
                    signal_group(child, signal.SIGKILL)
                    child.wait()
            self._children.clear()

    def _start_all(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        if self.config.redis_url is None:
            folder = self.config.folder / "redis"
            self._start("redis", "synthrep_cli.embedded_redis", str(self._redis_port), str(folder))
        self._start("generator-api", "synthrep_generator.api")
        self._start("reconciler", "synthrep_generator.reconciler")
        for number in range(self.config.workers):
            name = f"generator-worker-{number}"
            self._start(name, "synthrep_generator.worker", gpu=self._gpu(number))
        self._start("trainer-api", "synthrep_trainer.api")
        self._start("launcher", "synthrep_trainer.launcher", gpu=self._gpu(0))
        for number in range(1, len(self.config.gpus)):
            name = f"launcher-{number}"
            self._start(name, "synthrep_trainer.launcher", gpu=self._gpu(number))

    def _gpu(self, number: int) -> str | None:
        gpus = self.config.gpus
        return gpus[number % len(gpus)] if gpus else None

    def _environment(self) -> dict[str, str]:
        redis_url = self.config.redis_url or f"redis://127.0.0.1:{self._redis_port}/0"
        return {
            **os.environ,
            "SYNTHREP_GENERATOR_ROOT": str(self.config.data),
            "SYNTHREP_GENERATOR_PORT": str(self._generator_port),
            "SYNTHREP_GENERATOR_REDIS_URL": redis_url,
            "SYNTHREP_TRAINER_ROOT": str(self.config.data),
            "SYNTHREP_TRAINER_RUNS": str(self.config.folder / "trainer"),
            "SYNTHREP_TRAINER_PORT": str(self._trainer_port),
            "SYNTHREP_TRAINER_GENERATOR_URL": self.generator_url,
            # Idle threads of one process must not spin on the cores that another needs.
            "OMP_WAIT_POLICY": "passive",
            **self.config.environment,
        }

    def _start(self, name: str, module: str, *arguments: str, gpu: str | None = None) -> None:
        environment = self._environment()
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with (self._logs / f"{name}.log").open("wb") as log, interrupts_held_back():
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=prepare_child,
            )

    def _missing(self, http: httpx.Client) -> list[str]:
        apis = {"generator": self.generator_url, "trainer": self.trainer_url}
        missing = [name for name, url in apis.items() if not _is_ok(http, f"{url}/readyz")]
        if self.config.workers and not self._has_worker(http):
            missing.append("worker")
        return missing

    def _has_worker(self, http: httpx.Client) -> bool:
        try:
            answer = http.get(f"{self.generator_url}/v1/workers")
        except httpx.TransportError:
            return False
        return answer.is_success and bool(answer.json()["items"])

    def _last_words(self, name: str) -> str:
        data = (self._logs / f"{name}.log").read_bytes()
        return data[-_LAST_WORDS_BYTES:].decode(errors="replace")


def _expect_free(port: int) -> None:
    with socket.socket() as probe:
        # As the services do: connections that linger from an earlier one are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(
                f"port {port} is taken, perhaps by another `synthrep up`; stop what listens there"
            ) from error


def _expect_redis(url: str) -> None:
    try:
        with Redis.from_url(url, socket_connect_timeout=_REDIS_S, socket_timeout=_REDIS_S) as redis:
            redis.ping()
    except (RedisError, ValueError) as error:
        raise StackError(
            f"no use of that Redis: {error}; start it, or leave --redis out for an embedded one"
        ) from error


def _is_ok(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).is_success
    except httpx.TransportError:
        return False
