"""`synthrep demo`: the whole loop on this machine, from captions to a judged encoder.

Everything goes over REST, as a user's own script would do it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from synthrep_cli.probe_table import ProbeRow, probe_table
from synthrep_cli.report import DemoReport, write_report
from synthrep_cli.stack import PID_FILE, Stack, StackConfig, StackError
from synthrep_cli.time_left import TimeLeft
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import BatchView, ProbeRequest, RunRequest, RunView

DATASET = "demo"
_POLL_S = 1.0
_PLAIN_EVERY_S = 10.0
_PROMPTS_PER_BATCH = 80
_FOLDERS = ("data", "logs", "redis", "trainer")
_REPORTS = ("report.html", "report.json")


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demo; the defaults fit ten minutes on two cores."""

    folder: Path = Path("runs/demo")
    captions: int = 240
    images_per_caption: int = 10
    max_images: int = 64_000
    captions_per_batch: int = 64
    images_per_step: int = 4
    seed: int = 0
    probe_sets: tuple[str, ...] = ()  # none named: every set that is known


def load_captions(path: Path, count: int) -> list[str]:
    """The first `count` captions of a tab-separated file of captions and counts."""
    lines = path.read_text().splitlines()[:count]
    return [line.partition("\t")[0] for line in lines]


def clear_folder(folder: Path) -> None:
    """Remove what an earlier demo left; makes the folder if it is absent.

    Raises:
        StackError: it holds what no demo made; nothing is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    foreign = {entry.name for entry in folder.iterdir()} - {*_FOLDERS, *_REPORTS, PID_FILE}
    if (folder / "data").is_dir():
        foreign |= {f"data/{e.name}" for e in (folder / "data").iterdir() if e.name != DATASET}
    if foreign:
        raise StackError(f"{folder} holds {min(foreign)}, which no demo made; name another folder")
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _REPORTS:
        (folder / name).unlink(missing_ok=True)


def run_demo(config: DemoConfig, captions: list[str], console: Console) -> DemoReport:
    """Start the services, generate, train, probe, stop; returns what `report.json` holds."""
    started = time.monotonic()
    clear_folder(config.folder)
    console.print("[bold]1/4[/] starting Valkey, generator, worker, trainer …")
    environment = {"SYNTHREP_TRAINER_THREADS": "2", "SYNTHREP_GENERATOR_THREADS": "1",
                   "SYNTHREP_PROBE_DATA": ""}  # fmt: skip
    with Stack(StackConfig(folder=config.folder, environment=environment)) as stack:
        stack.wait_ready(lambda text: console.print(f"    {text}"))
        console.print(f"    watch it at [link]{stack.trainer_url}/[/] while it runs")
        with stack.client() as client:
            console.print(
                f"[bold]2/4[/] {len(captions)} captions × {config.images_per_caption} images "
                "are drawn, and an untrained encoder learns from them meanwhile"
            )
            batches = [
                client.submit(
                    DATASET,
                    captions[i : i + _PROMPTS_PER_BATCH],
                    images_per_prompt=config.images_per_caption,
                    model="tiny",
                    seed=config.seed,
                ).id
                for i in range(0, len(captions), _PROMPTS_PER_BATCH)
            ]
            run = client.train(
                RunRequest(
                    dataset=DATASET,
                    max_images=config.max_images,
                    captions_per_batch=config.captions_per_batch,
                    images_per_caption=config.images_per_step,
                    seed=config.seed,
                )
            )
            run = _follow(client, stack, batches, run, console)
            console.print("[bold]3/4[/] linear probes on labelled sets, frozen features")
            probes = _probe_all(client, stack, run.id, config, console)
            console.print("[bold]4/4[/] writing the report")
            report = _collect(client, run, probes, time.monotonic() - started)
            write_report(report, client, DATASET, config.folder)
    console.print(probe_table(report.probes))
    console.print(
        f"{report.images_generated} images in {report.groups_committed} groups, "
        f"{report.train_steps} steps on {report.images_trained} views; "
        f"{report.steps_before_last_shard} steps were done before the last shard was sealed. "
        f"{report.wall_s / 60:.1f} minutes."
    )
    console.print(f"The picture book: [link]{config.folder / 'report.html'}[/]")
    return report


def _follow(
    client: SynthRep, stack: Stack, batches: list[str], run: RunView, console: Console
) -> RunView:
    """Show progress until the run has ended; raises StackError if it failed."""
    with _bars(console) as show:
        while True:
            stack.check()
            views = [client.batch(b) for b in batches]
            run = client.run(run.id)
            show(views, run)
            if run.state == "failed":
                raise StackError(f"training failed: {run.error}")
            if run.state in ("completed", "cancelled"):
                return run
            time.sleep(_POLL_S)


@contextmanager
def _bars(console: Console) -> Iterator[Any]:
    """A callback that draws bars on a terminal, and prints a plain line now and then elsewhere."""
    if not console.is_terminal:
        last = -_PLAIN_EVERY_S
        time_left = TimeLeft()

        def plain(views: list[BatchView], run: RunView) -> None:
            nonlocal last
            left = time_left(run.step, run.max_steps) if run.step else ""
            if time.monotonic() - last >= _PLAIN_EVERY_S:
                last = time.monotonic()
                facts = (*_facts(views, run), left)
                console.print(" · ".join(filter(None, facts)), soft_wrap=True)

        yield plain
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(20), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
               TextColumn("{task.fields[facts]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        groups = progress.add_task("captions", total=None, facts="")
        steps = progress.add_task("steps", total=None, facts="")

        def draw(views: list[BatchView], run: RunView) -> None:
            accepted = sum(v.prompts.accepted for v in views)
            done = sum(v.prompts.committed + v.prompts.failed for v in views)
            facts = _facts(views, run)
            progress.update(groups, total=accepted, completed=done, facts=facts[0])
            progress.update(steps, total=run.max_steps, completed=run.step, facts=facts[1])

        yield draw


def _facts(views: list[BatchView], run: RunView) -> tuple[str, str]:
    images = sum(v.images_committed for v in views)
    committed = sum(v.prompts.committed for v in views)
    rate = sum(v.images_per_s or 0 for v in views if v.state == "running")
    generation = f"{committed} captions, {images} images"
    if rate:
        generation += f", {rate:.1f} images/s"
    loss = "–" if run.loss is None else f"{run.loss:.3f}"
    ratio = run.generated_per_trained
    training = f"step {run.step}/{run.max_steps}, loss {loss}"
    if ratio is not None:
        training += f", generated : trained = 1 : {1 / ratio if ratio else 0:.1f}"
    return generation, training


def _probe_all(
    client: SynthRep, stack: Stack, run_id: str, config: DemoConfig, console: Console
) -> list[ProbeRow]:
    started = [
        client.start_probe(ProbeRequest(run_id=run_id, dataset=name))
        for name in config.probe_sets or [s["name"] for s in client.probe_datasets()]
    ]
    rows = []
    for view in started:
        while view.state in ("queued", "running"):
            stack.check()
            time.sleep(_POLL_S)
            view = client.probe(view.id)
        if view.state != "completed":
            raise StackError(f"the probe on {view.dataset} failed: {view.error}")
        row = ProbeRow.from_view(view)
        console.print(
            f"  {row.dataset}: {row.trained:.1%} trained, {row.random_init:.1%} untrained"
        )
        rows.append(row)
    return rows


def _collect(client: SynthRep, run: RunView, probes: list[ProbeRow], wall_s: float) -> DemoReport:
    shards = list(client.shards(DATASET))
    metrics = list(client.metrics(run.id))
    sealed = shards[-1].created_at
    times = [m["time"] for m in metrics]
    return DemoReport(
        images_generated=sum(s.images for s in shards),
        groups_committed=sum(s.groups for s in shards),
        train_steps=run.step,
        images_trained=run.images_seen,
        wall_s=wall_s,
        first_step_at=times[0],
        last_shard_committed_at=sealed.isoformat(),
        steps_before_last_shard=sum(1 for t in times if _is_before(t, sealed)),
        probes=probes,
        metrics=metrics,
    )


def _is_before(text: str, moment: datetime) -> bool:
    return datetime.fromisoformat(text) < moment
