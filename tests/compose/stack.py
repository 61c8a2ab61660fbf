"""The stack of the compose file under a project name of its own, with ports of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from synthrep_cli.stack import free_port
from synthrep_shared.client import SynthRep
from tests.compose.engine import Engine, run

UP_S = 300
_KILL = """
import os, pathlib
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit() and int(entry.name) not in (1, os.getpid()):
        if b"synthrep_generator.worker" in (entry / "cmdline").read_bytes():
            os.kill(int(entry.name), 9)
"""


class ComposeStack:
    """Images built from this checkout, and the services that run them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.project = f"synthrep-e2e-{os.getpid()}"
        self._ports = {name: str(free_port()) for name in ("GENERATOR", "TRAINER")}
        self._binary = str(Path(sys.executable).with_name("docker-compose"))

    def build(self, bases: dict[str, str]) -> None:
        """The four images that the CPU needs; `bases` are base images by target."""
        for name, service in self._services().items():
            recipe = service.get("build")
            if recipe is None or name in ("init", "generator-reconciler"):
                continue
            target, arguments = recipe["target"], []
            if bases:
                arguments += ["--build-arg", "TORCH_INDEX_URL="]
            if target in bases:
                arguments += ["--build-arg", f"PYTHON_IMAGE={bases[target]}"]
            self._engine.docker(
                "build", "-q", "-f", recipe["dockerfile"], "--target", target,
                "-t", service["image"], *arguments, ".", limit_s=1800,
            )  # fmt: skip

    def compose(self, *arguments: str, limit_s: float = 120, check: bool = True) -> str:
        """Run compose on this project; what it printed."""
        environment = {f"SYNTHREP_{name}_PORT": port for name, port in self._ports.items()}
        result = run(
            self._binary, "-p", self.project, "--env-file", "/dev/null", *arguments,
            limit_s=limit_s, check=check, COMPOSE_PROFILES="", **environment,
        )  # fmt: skip
        return result.stdout

    def up(self) -> None:
        """Start what is not running, and wait until all are healthy."""
        self.compose("up", "-d", "--no-build", "--pull", "never", "--wait",
                     "--wait-timeout", str(UP_S), limit_s=UP_S + 60)  # fmt: skip

    def down(self) -> None:
        """Take away services, networks and volumes."""
        self.compose("down", "-v", "--timeout", "30", limit_s=300)

    def inside(self, service: str, *command: str) -> str:
        """Run a command in a service's container."""
        return self.compose("exec", "-T", service, *command)

    def client(self) -> SynthRep:
        """A client with the key that init made."""
        return SynthRep(
            f"http://127.0.0.1:{self._ports['GENERATOR']}",
            f"http://127.0.0.1:{self._ports['TRAINER']}",
            api_key=self.inside("generator-api", "cat", "/run/synthrep/api-key").strip(),
        )

    def kill_worker(self) -> None:
        """SIGKILL to the worker, as if its host had ended it; the engine starts it again."""
        command = ("exec", "-T", "generator-worker", "python", "-c", _KILL)
        self.compose(*command, check=False)  # the command goes down with its container

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine says of each service's container, init's that has ended too."""
        ids = self.compose("ps", "-a", "-q").split()
        found = json.loads(self._engine.docker("inspect", *ids))
        return {c["Config"]["Labels"]["com.docker.compose.service"]: c for c in found}

    def _services(self) -> dict[str, Any]:
        config = json.loads(self.compose("config", "--format", "json"))
        return dict(config["services"])
