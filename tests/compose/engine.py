"""The Docker engine and its client: the one that answers, or Debian's, started here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_START_S = 60
_APT = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
_PACKAGES = ["docker.io", "iptables", "tini", "debootstrap", "ca-certificates"]


class NoEngineError(RuntimeError):
    """There is no engine and none can be started here; says why."""


def say(line: str) -> None:
    """One line on standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(
    *command: str, limit_s: float = 120, text: str = "", check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command at the repository's root, its output kept; raises RuntimeError with its end."""
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, input=text, timeout=limit_s,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if check and result.returncode != 0:
        end = (result.stdout + result.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {result.returncode}:\n{end}")
    return result


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> float:
    """Poll; the seconds that it took. Raises TimeoutError."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.5)
    return time.monotonic() - begin


class Engine:
    """An engine and a client with BuildKit; `with Engine() as engine` stops what it started."""

    def __init__(self) -> None:
        self._daemon: subprocess.Popen[bytes] | None = None
        self.client = shutil.which("docker") or ""

    def __enter__(self) -> Engine:
        if not self._answers():
            self._start()
        self.client = self._client_with_buildkit()
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(60)

    def docker(self, *arguments: str, limit_s: float = 120, check: bool = True) -> str:
        """Run the client; what it printed."""
        command = (self.client, *arguments)
        return run(*command, limit_s=limit_s, check=check, DOCKER_BUILDKIT="1").stdout.strip()

    def has_image(self, name: str) -> bool:
        """Whether the image is here."""
        return run(self.client, "image", "inspect", name, check=False).returncode == 0

    def _answers(self) -> bool:
        return bool(self.client) and run(self.client, "info", check=False).returncode == 0

    def _start(self) -> None:
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise NoEngineError("no Docker engine answers; start one, or be root on Debian")
        if not Path("/usr/sbin/dockerd").exists():
            run("apt-get", "update", "-qq", limit_s=300)
            run(*_APT, *_PACKAGES, limit_s=600, DEBIAN_FRONTEND="noninteractive")
        Path("/var/run/docker.pid").unlink(missing_ok=True)
        log = Path("/tmp/synthrep-dockerd.log").open("wb")  # noqa: SIM115
        self._daemon = subprocess.Popen(
            ["/usr/sbin/dockerd"], stdout=log, stderr=log, start_new_session=True
        )
        self.client = "/usr/bin/docker"
        try:
            wait_until(self._answers, _START_S, "the engine's answer")
        except TimeoutError as error:
            self.__exit__()
            tail = Path("/tmp/synthrep-dockerd.log").read_text()[-1000:]
            raise NoEngineError(f"Debian's engine does not start here:\n{tail}") from error

    def _client_with_buildkit(self) -> str:
        """A client that builds with BuildKit: a new one by its plugin, Debian's by itself."""
        for client in (self.client, "/usr/bin/docker"):
            old = "version 20." in run(client, "--version", check=False).stdout
            if old or run(client, "buildx", "version", check=False).returncode == 0:
                return client
        raise NoEngineError("no Docker client here builds with BuildKit; install docker-buildx")
