"""One row and seed of a comparison: its training run, the probes of it, and what they leave."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from synthrep_cli.comparison_config import BASELINES, Comparison
from synthrep_cli.comparison_rows import Cost, ResultRow, append_rows, read_rows
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeRequest, ProbeView, RunRequest, RunView

_CURVE_POINTS = 100
_ENDED = ("completed", "failed")


@dataclass
class Run:
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


def gpus_here() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from torch import cuda

    named = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    return tuple(named[: cuda.device_count()] or map(str, range(cuda.device_count())))


def views_of(run: Run, steps: int) -> int:
    images, crops = run.request.images_per_caption or 1, 1 + (run.request.objective == "simclr")
    return steps * run.request.captions_per_batch * images * crops


def advance(client: SynthRep, run: Run) -> None:
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


def _start_probe(client: SynthRep, run: Run, run_id: str, name: str) -> ProbeView:
    """The probe of an earlier invocation, unless it failed; else a new one."""
    request = ProbeRequest(run_id=run_id, dataset=name)
    for attempt in count():
        key = f"compare-{run.key}-{name}-{attempt}"
        view = client.start_probe(request, idempotency_key=key)
        if view.state != "failed":
            break
    return view


def record(client: SynthRep, run: Run, curves: Path, rows_file: Path, config: Comparison) -> None:
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
    curves.mkdir(exist_ok=True)
    (curves / f"{run.key}.json").write_text(json.dumps(curve))
    there = {(r.key, r.row, r.dataset) for r in read_rows(rows_file)}
    rows = [
        result
        for view in run.probes.values()
        for result in _results(run, view, config, cost)
        if (result.key, result.row, result.dataset) not in there
    ]
    append_rows(rows_file, rows)


def _results(run: Run, view: ProbeView, config: Comparison, cost: Cost) -> list[ResultRow]:
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
