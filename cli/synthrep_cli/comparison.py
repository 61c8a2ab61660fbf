"""`synthrep compare`: rows of a table, each a training run and its probes, by one configuration.

Everything that can be asked for twice is asked for by a key made of what it is: batches, runs and
probes that an earlier invocation began are found again and go on. What has a line in the file of
results is not done again at all, also where the folder of the services is gone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from synthrep_cli.comparison_config import BASELINES, Comparison, ComparisonError
from synthrep_cli.comparison_progress import Show, progress
from synthrep_cli.comparison_rows import (
    METRICS,
    Cost,
    ResultRow,
    append_rows,
    missing_sets,
    read_rows,
)
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
from synthrep_shared.messages import ProbeRequest, ProbeView, RunRequest, RunView
from synthrep_shared.storage import DatasetPaths

_POLL_S = 1.0
_CURVE_POINTS = 100
_ENDED = ("completed", "failed")


@dataclass(frozen=True)
class Places:
    """Where a comparison finds and leaves its files."""

    folder: Path
    """Of the services, the curves and the report."""
    rows: Path
    """The file of results."""
    config_folder: Path
    """What files named in the configuration are relative to."""


@dataclass
class _Run:
    """One row and seed on its way."""

    row: str
    seed: int
    key: str
    request: RunRequest
    sets: list[str]
    """Sets without a result yet."""
    view: RunView | None = None
    probes: dict[str, ProbeView] = field(default_factory=dict)
    error: str = ""

    @property
    def is_over(self) -> bool:
        return bool(self.error) or (
            bool(self.probes) and all(p.state in _ENDED for p in self.probes.values())
        )


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


def gpus_here() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from torch import cuda

    named = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    return tuple(named[: cuda.device_count()] or map(str, range(cuda.device_count())))


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
) -> list[_Run]:
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
                runs.append(_Run(row, seed, key, request, missing))
    return runs


def _submit(client: SynthRep, runs: Sequence[_Run]) -> None:
    for run in runs:
        run.view = client.train(run.request, idempotency_key=f"compare-{run.key}")
        if run.view.state in ("failed", "paused", "cancelled"):
            run.view = client.control_run(run.view.id, "resume")


def _follow(
    client: SynthRep, stack: Stack, runs: list[_Run], places: Places, config: Comparison, show: Show
) -> list[str]:
    """Until every run has its results or has failed; returns what failed, a sentence each."""
    left = list(runs)
    while left:
        stack.check()
        for run in left:
            _advance(client, run)
            if run.is_over and not run.error:
                _record(client, run, places, config)
        left = [run for run in left if not run.is_over]
        total = sum(_views(run, run.view.max_steps if run.view else 0) for run in runs)
        done = sum(_views(run, run.view.step if run.view else 0) for run in runs)
        show("views", done, total, f"{len(runs) - len(left)} of {len(runs)} runs are over")
        if left:
            time.sleep(_POLL_S)
    return [f"{run.row}, seed {run.seed}: {run.error}" for run in runs if run.error]


def _views(run: _Run, steps: int) -> int:
    images, crops = run.request.images_per_caption or 1, 1 + (run.request.objective == "simclr")
    return steps * run.request.captions_per_batch * images * crops


def _advance(client: SynthRep, run: _Run) -> None:
    """One look at a run or its probes; starts the probes once it is trained."""
    assert run.view is not None
    if run.view.state != "completed":
        run.view = client.run(run.view.id)
        if run.view.state == "failed":
            run.error = run.view.error or "failed"
        elif run.view.state in ("paused", "cancelled"):
            run.error = f"somebody stopped it: it is {run.view.state}"
    elif not run.probes:
        for name in run.sets:
            run.probes[name] = _start_probe(client, run, run.view.id, name)
    else:
        for name, view in run.probes.items():
            if view.state not in _ENDED:
                run.probes[name] = client.probe(view.id)
        bad = [p for p in run.probes.values() if p.state == "failed"]
        if bad and run.is_over:
            run.error = f"the probe on {bad[0].dataset} failed: {bad[0].error}"


def _start_probe(client: SynthRep, run: _Run, run_id: str, name: str) -> ProbeView:
    """The probe of an earlier invocation, unless it failed; else a new one."""
    request = ProbeRequest(run_id=run_id, dataset=name)
    for attempt in count():
        key = f"compare-{run.key}-{name}-{attempt}"
        view = client.start_probe(request, idempotency_key=key)
        if view.state != "failed":
            break
    return view


def _record(client: SynthRep, run: _Run, places: Places, config: Comparison) -> None:
    """Append the results of a run, and of the baselines that its probes found beside it."""
    assert run.view is not None
    metrics = list(client.metrics(run.view.id))
    seen = [0, *(m["images_seen"] for m in metrics)]
    steps = zip(pairwise(seen), metrics, strict=True)
    seconds = sum((b - a) / m["images_per_s"] for (a, b), m in steps if m["images_per_s"])
    device = "GPU" if gpus_here() else "CPU"
    cost = Cost(views=seen[-1], train_s=round(seconds, 1), device=device)
    points = metrics[:: max(1, len(metrics) // _CURVE_POINTS)]
    curve = {"row": run.row, "seed": run.seed,
             "points": [(m["images_seen"], m["loss"]) for m in points]}  # fmt: skip
    curves = places.folder / "curves"
    curves.mkdir(exist_ok=True)
    (curves / f"{run.key}.json").write_text(json.dumps(curve))
    there = {(r.key, r.row, r.dataset) for r in read_rows(places.rows)}
    rows = [
        result
        for view in run.probes.values()
        for result in _results(run, view, config, cost)
        if (result.key, result.row, result.dataset) not in there
    ]
    append_rows(places.rows, rows)


def _results(run: _Run, view: ProbeView, config: Comparison, cost: Cost) -> list[ResultRow]:
    shared: dict[str, Any] = {
        "seed": run.seed, "dataset": view.dataset, "protocol": view.protocol,
        "metric": view.metric, "n_test": view.n_test,
        "class_sizes": [c["n_test"] for c in view.per_class or []],
    }  # fmt: skip
    found: dict[str, tuple[Any, ...]] = {run.row: (run.key, view.value, view.ci95, view.hits, cost)}
    for name in BASELINES:
        score = (view.baselines or {}).get(name.replace("-", "_"))
        if score and name in config.rows:
            key = config.baseline_key(name, run.seed)
            found[name] = (key, score["value"], score["ci95"], score["hits"], None)
    return [
        ResultRow.model_validate(shared | {
            "row": row, "key": key, "value": value, "ci95": ci95, "hits": hits, "cost": its_cost,
        })
        for row, (key, value, ci95, hits, its_cost) in found.items()
    ]  # fmt: skip


def results_of(
    config: Comparison, names: dict[str, str], sets: Sequence[str], rows: Sequence[ResultRow]
) -> list[ResultRow]:
    """Those of all results that belong to this comparison."""
    keys = {
        (config.key(row, seed, dataset=names[row]), row)
        for row in config.trained_rows
        for seed in config.seeds
    } | {(config.baseline_key(b, s), b) for b in BASELINES if b in config.rows
         for s in config.seeds}  # fmt: skip
    return [r for r in rows if (r.key, r.row) in keys and r.dataset in sets]
