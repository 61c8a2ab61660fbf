"""Two hosts, a cable between them, and torchrun on each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from synthrep_trainer.runs import RunFolder

_PORT = 29400
_RETRIES = 6  # about 25 s
_JOIN_S, _READ_S = 60, 10  # what an agent waits for the others, and for the rendezvous


class Host:
    """A network namespace with one address, and the processes that run in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = f"{name}-{os.getpid()}", address
        self.interface = f"eth-{name}"
        self.processes: list[subprocess.Popen[bytes]] = []
        _ip("netns", "add", self.name)
        # A cut-off torchrun waits for its rendezvous until TCP gives up: 15 minutes by default.
        _ip("netns", "exec", self.name, "sysctl", "-qw", f"net.ipv4.tcp_retries2={_RETRIES}")
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        """`ip` on this host."""
        _ip("-n", self.name, *arguments)

    def plug_in(self) -> None:
        """Give the cable's end its address."""
        self.ip("addr", "add", f"{self.address}/24", "dev", self.interface)
        self.ip("link", "set", self.interface, "up")

    def torchrun(
        self, folder: RunFolder, environment: dict[str, str], *, hosts: list[Host], restarts: int
    ) -> subprocess.Popen[bytes]:
        """Join the training of a run; the first of `hosts` keeps the rendezvous."""
        command = [
            "ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={len(hosts)}", "--nproc-per-node=1", f"--max-restarts={restarts}",
            "--rdzv-backend=c10d", f"--rdzv-id={folder.id}",
            f"--rdzv-endpoint={hosts[0].address}:{_PORT}",
            f"--rdzv-conf=join_timeout={_JOIN_S},read_timeout={_READ_S},"
            f"is_host={int(self is hosts[0])}",
            f"--local-addr={self.address}",
            "--module", "--", "synthrep_trainer.train", "--run", str(folder.path),
        ]  # fmt: skip
        with (folder.path / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | environment | {"GLOO_SOCKET_IFNAME": self.interface},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def ranks(self) -> list[int]:
        """Ids of the train processes here."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        return [pid for pid in map(int, found.stdout.split()) if _is_rank(pid)]

    def crash(self) -> None:
        """Everything that runs here is gone at once."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in map(int, found.stdout.split()):
            _kill(pid)
        for process in self.processes:
            process.wait()

    def close(self) -> None:
        """Take the host away."""
        self.crash()
        subprocess.run(["ip", "netns", "del", self.name], check=False)


def connect(first: Host, second: Host) -> None:
    """Lay a cable between two hosts, in place of the one that the first may have."""
    unplug = ["ip", "-n", first.name, "link", "del", first.interface]
    subprocess.run(unplug, check=False, capture_output=True)
    _ip("link", "add", first.interface, "netns", first.name, "type", "veth",
        "peer", "name", second.interface, "netns", second.name)  # fmt: skip
    first.plug_in()
    second.plug_in()


def wait_until(condition: object, limit_s: float, what: str) -> float:
    """Poll a callable; the seconds it took. Raises TimeoutError."""
    assert callable(condition)
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - begin


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"synthrep_trainer.train" in words and b"torch.distributed.run" not in words


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
