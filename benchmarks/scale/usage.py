"""What services take of processors and memory while something is measured."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.scale.upload import resident_bytes
from benchmarks.services import Services

_SAMPLE_S = 1.0


class Usage:
    """Begins when it is made; `crew` are the processes of the workers."""

    def __init__(self, services: Services, crew: list[int]) -> None:
        self._services, self._crew = services, crew
        self._info, self._before = services.redis.info(), self._cpu_s()
        self._started = time.monotonic()
        self._api_bytes = self._api_peak = resident_bytes(services.pid("api"))
        self._redis_peak = self._clients = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def end(self) -> dict[str, Any]:
        """By name: cores, which are processor seconds a second, and MB, which are 10^6 bytes."""
        seconds = time.monotonic() - self._started
        info, after = self._services.redis.info(), self._cpu_s()
        self._ended.set()
        self._sampler.join()
        commands = info["total_commands_processed"] - self._info["total_commands_processed"]
        redis_s = _redis_cpu_s(info) - _redis_cpu_s(self._info)
        return {
            **{name: short((after[name] - s) / seconds) for name, s in self._before.items()},
            "redis_idle_mb": short(self._info["used_memory"] / 1e6),
            "redis_peak_mb": short(self._redis_peak / 1e6),
            "redis_clients": self._clients,
            "redis_cores": short(redis_s / seconds),
            "redis_commands_per_s": short(commands / seconds),
            "api_growth_mb": short((self._api_peak - self._api_bytes) / 1e6),
        }

    def _sample(self) -> None:
        while True:
            info = self._services.redis.info()
            self._redis_peak = max(self._redis_peak, info["used_memory"])
            self._clients = max(self._clients, info["connected_clients"])
            self._api_peak = max(self._api_peak, resident_bytes(self._services.pid("api")))
            if self._ended.wait(_SAMPLE_S):
                return

    def _cpu_s(self) -> dict[str, float]:
        return {
            "api_cores": _process_cpu_s(self._services.pid("api")),
            "reconciler_cores": _process_cpu_s(self._services.pid("reconciler")),
            "workers_cores": sum(map(_process_cpu_s, self._crew)),
        }


def short(value: float) -> float:
    """Four digits of it."""
    return float(f"{value:.4g}")


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _redis_cpu_s(info: dict[str, Any]) -> float:
    return float(info["used_cpu_sys"] + info["used_cpu_user"])
