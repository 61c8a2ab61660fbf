"""`synthrep compare`: rows of a table, each a training run and its probes, by one configuration.

Everything that can be asked for twice is asked for by a key made of what it is: batches, runs and
probes that an earlier invocation began are found again and go on. What has a line in the file of
results is not done again at all, also where the folder of the services is gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from synthrep_cli.comparison_config import BASELINES, Comparison, ComparisonError
from synthrep_cli.comparison_progress import Show, progress
from synthrep_cli.comparison_rows import (
    METRICS,
    ResultRow,
    missing_sets,
    read_rows,
)
from synthrep_cli.comparison_runs import Run, advance, gpus_here, record, views_of
from synthrep_cli.comparison_worlds import (
    captions_of,
    import_real,
    probe_data_folder,
    real_name,
    real_source,
    submit_captions,
    wait_for_images,
)
from synthrep_cli.stack import Stack, StackConfig
from synthrep_shared.client import SynthRep
from synthrep_shared.storage import DatasetPaths

_POLL_S = 1.0


@dataclass(frozen=True)
class Places:
    """Where a comparison finds and leaves its files."""

    folder: Path
    """Of the services, the curves and the report."""
    rows: Path
    """The file of results."""
    config_folder: Path
    """What files named in the configuration are relative to."""


@dataclass(frozen=True)
class Finished:
    """What there is once nothing is left to do."""

    config: Comparison
    rows: list[ResultRow]
    """Of this comparison alone."""
    world: str
    """`photos` or `drawings`: what the real images are; empty without a real row."""
    failures: list[str]
    sets: list[str]


def run_comparison(
    config: Comparison, places: Places, console: Console, environment: dict[str, str] | None = None
) -> Finished:
    """Do what is missing and return all results; a run that fails holds up no other.

    Raises ComparisonError, StackError, StorageError. Call again to go on.
    """
    gpus, machine = gpus_here(), config.machine
    given = {
        "SYNTHREP_TRAINER_MAX_RUNS": "1" if gpus else str(machine.parallel_runs),
        "SYNTHREP_TRAINER_THREADS": str(machine.threads),
        "SYNTHREP_GENERATOR_THREADS": str(max(1, machine.threads)),
        **(environment or {}),
    }
    stack_config = StackConfig(
        folder=places.folder, workers=len(gpus) or machine.parallel_runs, environment=given,
        gpus=gpus,
    )  # fmt: skip
    with Stack(stack_config) as stack:
        stack.wait_ready()
        with stack.client() as client, progress(console) as show:
            sets = _sets(config, client)
            names, world = _datasets(config, places, stack, client, show)
            runs = _plan(config, names, sets, read_rows(places.rows))
            _submit(client, runs)
            failures = _follow(client, stack, runs, places, config, show)
    rows = results_of(config, names, sets, read_rows(places.rows))
    return Finished(config, rows, world, failures, sets)


def _sets(config: Comparison, client: SynthRep) -> list[str]:
    """The sets to judge on; those of several labels an image cannot be paired image by image."""
    known = [s["name"] for s in client.probe_datasets() if s.get("metric") in METRICS]
    unknown = set(config.probe_sets) - set(known)
    if unknown:
        raise ComparisonError(f"{min(unknown)} cannot be judged on; known: {', '.join(known)}")
    return list(config.probe_sets) or known


def _datasets(
    config: Comparison, places: Places, stack: Stack, client: SynthRep, show: Show
) -> tuple[dict[str, str], str]:
    """The data set of each trained row, filled, and what the real images are."""
    real = {row for row in config.trained_rows if row.endswith("-real")}
    names, world = {}, ""
    if real:
        source = real_source(config.real, probe_data_folder())
        world, name = source.kind, real_name(config.real, source)
        names.update(dict.fromkeys(real, name))
        paths = DatasetPaths(stack.config.data, name)
        import_real(config.real, source, paths, places.folder / "real")
    if len(real) < len(config.trained_rows):
        captions = captions_of(config, places.config_folder)
        name = config.generated_name(captions)
        names.update(dict.fromkeys(set(config.trained_rows) - real, name))
        batches = submit_captions(client, config, captions)
        wait_for_images(client, stack, batches, lambda n, of: show("images of captions", n, of))
    return names, world


def _plan(
    config: Comparison, names: dict[str, str], sets: Sequence[str], rows: Sequence[ResultRow]
) -> list[Run]:
    """What is missing, seed by seed, so that a part of the seeds is a whole table early."""
    runs = []
    for seed in config.seeds:
        needed = [
            name
            for baseline in BASELINES
            if baseline in config.rows
            for name in missing_sets(rows, config.baseline_key(baseline, seed), baseline, sets)
        ]
        for row in config.trained_rows:
            key = config.key(row, seed, dataset=names[row])
            missing = missing_sets(rows, key, row, sets)
            if row == config.trained_rows[0]:
                missing = [name for name in sets if name in missing or name in needed]
            if missing:
                request = config.request(row, seed, dataset=names[row])
                runs.append(Run(row, seed, key, request, missing))
    return runs


def _submit(client: SynthRep, runs: Sequence[Run]) -> None:
    for run in runs:
        run.view = client.train(run.request, idempotency_key=f"compare-{run.key}")
        if run.view.state in ("failed", "paused", "cancelled"):
            run.view = client.control_run(run.view.id, "resume")


def _follow(
    client: SynthRep, stack: Stack, runs: list[Run], places: Places, config: Comparison, show: Show
) -> list[str]:
    """Until every run has its results or has failed; returns what failed, a sentence each."""
    left = list(runs)
    while left:
        stack.check()
        for run in left:
            advance(client, run)
            if run.is_over and not run.error:
                record(client, run, places.folder / "curves", places.rows, config)
        left = [run for run in left if not run.is_over]
        total = sum(views_of(run, run.view.max_steps if run.view else 0) for run in runs)
        done = sum(views_of(run, run.view.step if run.view else 0) for run in runs)
        show("views", done, total, f"{len(runs) - len(left)} of {len(runs)} runs are over")
        if left:
            time.sleep(_POLL_S)
    return [f"{run.row}, seed {run.seed}: {run.error}" for run in runs if run.error]


def results_of(
    config: Comparison, names: dict[str, str], sets: Sequence[str], rows: Sequence[ResultRow]
) -> list[ResultRow]:
    """Those of all results that belong to this comparison.

    Raises ComparisonError where some are of other test images than the rest: a set was replaced.
    """
    keys = {
        (config.key(row, seed, dataset=names[row]), row)
        for row in config.trained_rows
        for seed in config.seeds
    } | {(config.baseline_key(b, s), b) for b in BASELINES if b in config.rows
         for s in config.seeds}  # fmt: skip
    found = [r for r in rows if (r.key, r.row) in keys and r.dataset in sets]
    class_sizes = {r.dataset: r.class_sizes for r in found}
    for r in found:
        if r.class_sizes != class_sizes[r.dataset]:
            raise ComparisonError(
                f"{r.dataset} has other test images than when {r.row}, seed {r.seed}, was judged; "
                "remove its older lines from the file of results, or name another by --rows"
            )
    return found
