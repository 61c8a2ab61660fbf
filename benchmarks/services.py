"""The generator's real processes on an embedded Valkey, for as long as a measurement takes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from redis import Redis

from synthrep_cli.stack import free_port
from synthrep_generator.settings import GeneratorSettings

_PR_SET_PDEATHSIG = 1
_START_S = 120.0
_STOP_S = 20.0
_LIBC = ctypes.CDLL(None)


class ServicesError(RuntimeError):
    """A service did not start or died; the message carries its last words."""


class Services:
    """API, reconciler and workers with the given generator settings; `with` stops every one."""

    def __init__(self, folder: Path, *, workers: int, api: bool = True, **settings: Any) -> None:
        self.folder, self.redis_port, self.api_port = folder, free_port(), free_port()
        self._values: dict[str, Any] = {
            "root": str(folder / "data"),
            "port": self.api_port,
            "redis_url": f"redis://127.0.0.1:{self.redis_port}/0",
            **settings,
        }
        self.settings = GeneratorSettings.model_validate(self._values)
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.redis = Redis(port=self.redis_port)
        self._modules = {"api": "synthrep_generator.api"} if api else {}
        self._modules["reconciler"] = "synthrep_generator.reconciler"
        for number in range(workers):
            self._modules[f"worker-{number}"] = "synthrep_generator.worker"
        self._workers = workers
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        (self.folder / "data").mkdir(parents=True)
        try:
            redis = str(self.folder / "redis")
            self._start("redis", "synthrep_cli.embedded_redis", str(self.redis_port), redis)
            self._wait(self._is_redis_up)
            for name, module in self._modules.items():
                self._start(name, module)
            self._wait(self._are_all_ready)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def pid(self, name: str) -> int:
        """Process id of `redis`, `api`, `reconciler` or `worker-<number>`."""
        return self._children[name].pid

    def log(self, name: str) -> list[dict[str, Any]]:
        """What a service logged so far, line by line."""
        text = self._log_path(name).read_text(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def cancel(self, batch: str) -> None:
        """Give up what is left of a batch."""
        httpx.post(f"{self.url}/v1/batches/{batch}/cancel").raise_for_status()

    def check(self) -> None:
        """Raise ServicesError if a service has died."""
        for name, child in self._children.items():
            if child.poll() is not None:
                words = self._log_path(name).read_text(errors="replace")[-2000:]
                raise ServicesError(f"{name} ended with status {child.returncode}: {words}")

    def _start(self, name: str, module: str, *arguments: str) -> None:
        environment = {
            f"SYNTHREP_GENERATOR_{key.upper()}": v if isinstance(v, str) else json.dumps(v)
            for key, v in self._values.items()
        }
        with self._log_path(name).open("wb") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=os.environ | {"OMP_WAIT_POLICY": "passive"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _log_path(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + _START_S
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise ServicesError(f"not ready after {_START_S:.0f} s; see {self.folder}")
            time.sleep(0.1)

    def _is_redis_up(self) -> bool:
        try:
            return bool(self.redis.ping())
        except OSError:
            return False

    def _are_all_ready(self) -> bool:
        prefix = f"synthrep:{self.settings.queue}:worker:"
        idle = sum(
            self.redis.hget(key, "state") == b"idle" for key in self.redis.keys(f"{prefix}*")
        )
        if idle < self._workers:
            return False
        try:
            return "api" not in self._modules or httpx.get(f"{self.url}/readyz").is_success
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        for name, child in reversed(self._children.items()):
            if name != "redis" and child.poll() is None:
                child.send_signal(signal.SIGTERM)
        self._children = dict(sorted(self._children.items(), key=lambda item: item[0] == "redis"))
        for name, child in self._children.items():
            if name == "redis":
                self.redis.close()
                child.send_signal(signal.SIGTERM)
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
