"""What a long commit log costs those who read it: `python -m benchmarks.scale.log_costs ROLE ROOT`.

A role is measured in a process of its own, so that its memory is its own, and prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.scale.clients import Client
from benchmarks.scale.made_logs import IMAGES, JOB_CAPTIONS, make_dataset, next_record
from benchmarks.scale.upload import resident_bytes
from benchmarks.scale.usage import short
from benchmarks.services import Services
from synthrep_generator.feeder import DatasetFeed, cut_chunks
from synthrep_generator.intake import list_batches
from synthrep_generator.progress import DatasetIndex, utc_now
from synthrep_shared.commit_log import CommitLog
from synthrep_shared.storage import DatasetPaths, list_names

DATASET = "made"
_LIMIT_S = 600.0
_PAGE = 100
_TIMES = 50
_BEHIND = (0, 10, 100, 1000)
_COMMITS = 3
_LOAD_S = 12.0
_JOB_IMAGES = IMAGES * JOB_CAPTIONS


def measure_log(captions: int) -> dict[str, Any]:
    """Make a data set of so many captions and measure every role on it."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        paths = DatasetPaths(root, DATASET)
        started = time.monotonic()
        make_dataset(paths, captions, has_files=True)
        found: dict[str, Any] = {
            "captions": captions,
            "images": captions * IMAGES,
            "records": -(-captions // JOB_CAPTIONS),
            "made_s": round(time.monotonic() - started, 1),
            "log_mb": short(paths.log.stat().st_size / 1e6),
        }
        for role in _ROLES:
            found[role] = _in_process(role, root)
        found["served"] = _serve(Path(temporary) / "services", root)
    return found


def _in_process(role: str, root: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale.log_costs", role, str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_LIMIT_S,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def api(paths: DatasetPaths) -> dict[str, float]:
    """The API's index: reading it in, and what it answers from it."""
    index = DatasetIndex(paths)
    found = _start_cost(index.refresh)
    last = index.last_seq
    batch = index.batches()[0]
    record = index.records(last // 2, 1)[0]
    found |= {
        "page_first_ms": _mean_ms(lambda: index.shards(0, _PAGE)),
        "page_middle_ms": _mean_ms(lambda: index.shards(last // 2, _PAGE)),
        "page_last_ms": _mean_ms(lambda: index.shards(last - _PAGE, _PAGE)),
        "group_ms": _mean_ms(lambda: index.group(record.groups[0].gid)),
        "batch_ms": _mean_ms(lambda: index.view(batch, running=0, now=utc_now())),
        "next_record_ms": _next_record_ms(paths, last, index.refresh),
    }
    return found


def worker(paths: DatasetPaths) -> dict[str, float]:
    """A worker's log: reading it in before the first job, and what the next record costs."""
    log = HeldLog(paths.log)
    found = _start_cost(log.refresh)
    found["next_record_ms"] = _next_record_ms(paths, log.refresh(), log.refresh)
    for behind in _BEHIND:
        found[f"lock_held_ms_{behind}_behind"] = _lock_held_ms(paths, behind)
    return found


def reconciler(paths: DatasetPaths) -> dict[str, float]:
    """The reconciler's first pass over the data set, and those after it."""
    feed = DatasetFeed(paths, job_images=_JOB_IMAGES)

    def sweep() -> None:
        feed.refresh()
        cut_chunks([feed], frozenset(), room=1)

    return _start_cost(sweep) | {"next_pass_ms": _mean_ms(sweep)}


def folder(paths: DatasetPaths) -> dict[str, float]:
    """Listing the folder of shards, which a check or a repair does and nothing else."""
    started = time.perf_counter()
    names = list_names(paths.shards)
    return {"start_s": short(time.perf_counter() - started), "files": len(names)}


_ROLES: dict[str, Callable[[DatasetPaths], dict[str, float]]] = {
    "api": api,
    "worker": worker,
    "reconciler": reconciler,
    "folder": folder,
}


def _start_cost(work: Callable[[], object]) -> dict[str, float]:
    before, started = resident_bytes(os.getpid()), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    grown = resident_bytes(os.getpid()) - before
    return {"start_s": short(seconds), "memory_mb": short(grown / 1e6)}


def _next_record_ms(paths: DatasetPaths, last: int, refresh: Callable[[], object]) -> float:
    """Of a record that another process appends; the log is as it was afterwards."""
    size = paths.log.stat().st_size
    line = next_record(last + 1, "0" * 32, 0, JOB_CAPTIONS).model_dump_json().encode()
    with Path(str(paths.log)).open("ab") as stream:
        stream.write(line + b"\n")
    started = time.perf_counter()
    refresh()
    milliseconds = 1e3 * (time.perf_counter() - started)
    os.truncate(str(paths.log), size)
    return short(milliseconds)


class HeldLog(CommitLog):
    """Keeps how long the last `append` held the file lock, where nobody else wants it."""

    held_s = 0.0

    @contextmanager
    def exclusive(self) -> Iterator[int]:
        """See CommitLog."""
        started = time.perf_counter()
        with super().exclusive() as torn_bytes:
            yield torn_bytes
        self.held_s = time.perf_counter() - started


def _lock_held_ms(paths: DatasetPaths, behind: int) -> float:
    """Of the commit of a worker whose job began so many records of others ago."""
    held = []
    for number in range(_COMMITS):
        path = paths.folder / f"lag-{behind}-{number}" / "commits.jsonl"
        late, others = HeldLog(path), CommitLog(path)
        for seq in range(1, behind + 1):
            _commit(others, "others", seq)
        _commit(late, "late", behind + 1)
        held.append(late.held_s)
    return short(1e3 * median(held))


def _commit(log: CommitLog, batch: str, seq: int) -> None:
    record = next_record(seq, batch, seq * JOB_CAPTIONS, JOB_CAPTIONS)
    log.append("shard", name=lambda _: record.name, groups=record.groups)


def _mean_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(_TIMES):
        work()
    return short(1e3 * (time.perf_counter() - started) / _TIMES)


def _serve(place: Path, root: Path) -> dict[str, Any]:
    """A real API and reconciler on the data set: when they are there, and how fast they answer."""
    batch = list_batches(DatasetPaths(root, DATASET))[0]
    started = time.monotonic()
    with Services(place, workers=0, root=str(root)) as services:
        clients = {
            "submit": Client(services.api_port, 5.0, _submit),
            "status": Client(
                services.api_port, 10.0, lambda: ("GET", f"/v1/batches/{batch}", None)
            ),
            "signal": Client(services.api_port, 2.0, lambda: ("GET", "/v1/scale", None)),
            "listing": Client(services.api_port, 2.0, _listing),
        }
        first = Client(services.api_port, 1.0, clients["submit"].request, timeout_s=_LIMIT_S)
        first.ask_once()
        answers_s = time.monotonic() - started
        while not services.redis.llen(f"rq:queue:{services.settings.queue}"):
            services.check()
            time.sleep(0.1)
        feeds_s = time.monotonic() - started
        for client in clients.values():
            client.start()
        time.sleep(_LOAD_S)
        for client in clients.values():
            client.stop()
    return {
        "api_answers_after_s": short(answers_s),
        "reconciler_feeds_after_s": short(feeds_s),
        **{name: asdict(client.latency()) for name, client in clients.items()},
    }


def _submit() -> tuple[str, str, Any]:
    prompts = [f"a photo of line {line}" for line in range(JOB_CAPTIONS)]
    return "POST", "/v1/batches", {"dataset": DATASET, "images_per_prompt": 1, "prompts": prompts}


def _listing() -> tuple[str, str, Any]:
    return "GET", f"/v1/datasets/{DATASET}/shards?limit={_PAGE}", None


def main() -> None:
    """Measure one role."""
    paths = DatasetPaths(Path(sys.argv[2]), DATASET)
    print(json.dumps(_ROLES[sys.argv[1]](paths)))


if __name__ == "__main__":
    main()
