"""`python -m tests.hosts`: one line a case; exit status 0 if each held."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from synthrep_shared.messages import RunRequest
from synthrep_trainer.metrics import last_metrics, read_metrics
from synthrep_trainer.runs import RunFolder, Workplace
from tests.hosts.hosts import Host, connect, wait_until
from tests.trainer.conftest import ShardMaker

RANK_TIMEOUT_S = 15
START_LIMIT_S = 180
END_LIMIT_S = 180  # the ranks' timeout, torchrun's attempt to join again, and a slow machine
_EARLY, _MORE = 25, 25


class Site:
    """A disk that both hosts see, with a data set and a run on it."""

    def __init__(self, folder: Path) -> None:
        maker = ShardMaker(folder / "data")
        for _ in range(4):
            maker.commit(16)
        self.hosts = [Host("a", "10.77.0.1"), Host("b", "10.77.0.2")]
        connect(*self.hosts)
        self.run = Workplace(folder / "runs")
        self.run.make_folders()
        self._environment = {
            "SYNTHREP_TRAINER_ROOT": str(folder / "data"),
            "SYNTHREP_TRAINER_RUNS": str(folder / "runs"),
            "SYNTHREP_TRAINER_DEVICE": "cpu",
            "SYNTHREP_TRAINER_THREADS": "1",
            "SYNTHREP_TRAINER_RANK_TIMEOUT_S": str(RANK_TIMEOUT_S),
            "SYNTHREP_TRAINER_GRACE_S": "5",
            "OMP_NUM_THREADS": "1",
        }

    def submit(self) -> RunFolder:
        """A run that would go on for hours."""
        return self.run.submit_run(RunRequest(
            dataset="birds", max_steps=100_000, image_size=16, captions_per_batch=8,
            images_per_caption=2, checkpoint_every=10, seed=1, max_uses_per_image=1_000_000,
        ))  # fmt: skip

    def start(self, folder: RunFolder, *numbers: int, of: int = 2, restarts: int = 0) -> None:
        """torchrun on these hosts."""
        for number in numbers:
            self.hosts[number].torchrun(
                folder, self._environment, hosts=self.hosts[:of], restarts=restarts
            )

    def close(self) -> None:
        """Leave nothing behind."""
        for host in self.hosts:
            host.close()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def step(folder: RunFolder) -> int:
    newest = last_metrics(folder.metrics)
    return newest["step"] if newest else 0


def reach(folder: RunFolder, wanted: int, limit_s: float = START_LIMIT_S) -> None:
    wait_until(lambda: step(folder) >= wanted, limit_s, f"step {wanted}")


def expect_whole(folder: RunFolder) -> None:
    """Every step is there once, in order."""
    steps = [line["step"] for line in read_metrics(folder.metrics, after=0, limit=100_000)]
    assert steps == list(range(1, len(steps) + 1)), "the steps have gaps"


def end_all(site: Site) -> float:
    """Seconds until every torchrun has ended by itself, none of them well."""
    running = [p for host in site.hosts for p in host.processes]
    took_s = wait_until(
        lambda: all(p.poll() is not None for p in running), END_LIMIT_S, "the end of the job"
    )
    assert all(p.returncode != 0 for p in running), [p.returncode for p in running]
    return took_s


def cut_link(site: Site) -> str:
    """The cable is pulled: the job ends with an error, and goes on with one host."""
    folder = site.submit()
    site.start(folder, 0, 1)
    reach(folder, _EARLY)
    site.hosts[1].ip("link", "set", site.hosts[1].interface, "down")
    took_s = end_all(site)
    failure = folder.failure
    assert failure is not None, "no failure.json"
    assert not failure.is_permanent
    reached = step(folder)
    site.start(folder, 0, of=1)
    reach(folder, reached + _MORE)
    expect_whole(folder)
    first_line = failure.error.splitlines()[0][:120]
    return f"ended after {took_s:.0f} s ({first_line}); resumed with 1 rank from step {reached}"


def killed_rank(site: Site) -> str:
    """A rank is killed: torchrun starts both again from the newest checkpoint."""
    folder = site.submit()
    site.start(folder, 0, 1, restarts=3)
    reach(folder, _EARLY)
    (rank,) = site.hosts[1].ranks()
    os.kill(rank, signal.SIGKILL)
    killed_at = step(folder)
    begin = time.monotonic()
    reach(folder, killed_at + _MORE, START_LIMIT_S)
    expect_whole(folder)
    return f"went on by itself; {_MORE} steps further after {time.monotonic() - begin:.0f} s"


def replaced_host(site: Site) -> str:
    """A host is gone and another comes in its place: the job ends, and goes on with both."""
    folder = site.submit()
    site.start(folder, 0, 1)
    reach(folder, _EARLY)
    site.hosts[1].crash()
    took_s = end_all(site)
    reached = step(folder)
    site.hosts[1].close()
    site.hosts[1] = Host("c", "10.77.0.3")
    connect(*site.hosts)
    site.start(folder, 0, 1)
    reach(folder, reached + _MORE)
    expect_whole(folder)
    return f"ended after {took_s:.0f} s; resumed with a new host from step {reached}"


CASES: tuple[Callable[[Site], str], ...] = (cut_link, killed_rank, replaced_host)


def main() -> int:
    """Every case on a site of its own; logs stay where one failed."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        say("skipped: network namespaces need Linux, root and iproute2 (`ip`)")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take the hosts away then, too
    failed = 0
    for case in CASES:
        folder = Path(tempfile.mkdtemp(prefix="synthrep-hosts-"))
        site = Site(folder)
        try:
            say(f"{case.__name__}: {case(site)}")
            is_good = True
        except (AssertionError, TimeoutError) as error:
            say(f"{case.__name__}: FAILED: {error}; logs in {folder}")
            is_good = False
        finally:
            site.close()
        if is_good:
            shutil.rmtree(folder)
        failed += not is_good
    say(f"{len(CASES) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
