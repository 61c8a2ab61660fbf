"""What each part of the page shows to one viewer: a function a part, from files and REST to HTML.

The trainer's side is read from its files within what the viewer owns, the generator's side comes
over REST. A generator that does not answer takes its own parts away and no other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError
from synthrep_shared.keys import Principal
from synthrep_shared.messages import DatasetView, ProbeView, RunView
from synthrep_trainer.context import Context, newest_first, readable
from synthrep_trainer.errors import RunError
from synthrep_trainer.feature_maps import read_feature_map
from synthrep_trainer.page.comparisons import newest_names, read_table
from synthrep_trainer.page.door import Keys
from synthrep_trainer.page.feature_map import drawing
from synthrep_trainer.page.figures import curve, thinned_metrics
from synthrep_trainer.page.generator import Generation, Generator, GroupPage, Place
from synthrep_trainer.page.probe_charts import charts, judged_by
from synthrep_trainer.page.rendering import render
from synthrep_trainer.problems import not_found
from synthrep_trainer.routes_comparisons import SUFFIX, reports
from synthrep_trainer.runs import RunFolder
from synthrep_trainer.views import probe_view, run_view

T = TypeVar("T")
_RUNS_SHOWN = 6
_PROBES_READ = 200
_WAITING_SHOWN = 8
_WORKERS_SHOWN = 8
_GROUPS_SHOWN = 12
_LINKS_SHOWN = 6
_NEIGHBOURS_SHOWN = 8
_COMPARISONS_LISTED = 50
_CURVES = (
    ("loss", "Loss"),
    ("effective_rank", "Effective rank"),
    ("lr", "Learning rate"),
)


@dataclass(frozen=True)
class Choice:
    """What the address of the page picks; None is the newest, or the first."""

    run: str | None = None
    dataset: str | None = None
    before: Place | None = None
    """Groups older than this one; None follows the newest as they come."""
    older_runs: str | None = None
    """Cursor of the list of runs."""
    comparison: str | None = None

    def query(self, **changes: Any) -> str:
        """The address with some of it changed; without `before`, unless that is given."""
        names = ("run", "dataset", "older_runs", "comparison")
        picks = {name: getattr(self, name) for name in names} | changes
        return urlencode({name: value for name, value in picks.items() if value})


class Absence(NamedTuple):
    """Why nothing is known of the generator."""

    sentence: str
    is_locked: bool
    """Whether a key of its own would open it."""


@dataclass(frozen=True)
class Viewer:
    """Who looks at one moment, and what there is to look at, looked up once."""

    context: Context
    generator: Generator
    caller: Principal
    keys: Keys

    def generation(self) -> tuple[Generation | None, Absence | None]:
        """How the generator stands, or None and why not."""
        try:
            return self.generator.generation(self.keys.generator), None
        except ServiceError as error:
            if error.status == HTTPStatus.UNAUTHORIZED:
                return None, Absence("it does not know this key.", is_locked=True)
            return None, Absence(error.detail or error.title, is_locked=False)
        except RunError as error:
            return None, Absence(str(error), is_locked=False)

    def ask(self, question: Callable[[SynthRep], T]) -> T:
        """What the generator says to this viewer; raises ServiceError, RunError."""
        return self.generator.ask(self.keys.generator, question)

    def sees(self, dataset: str) -> bool:
        """Whether captions of a data set, which a run's map repeats, are the viewer's to read.

        Anyone may train on a data set, so that is for the generator to say, where there is one.
        """
        if self.caller.is_admin or self.caller.lists(dataset) or self.generator.is_unnamed:
            return True
        found, _ = self.generation()
        return found is not None and any(known.name == dataset for known in found.datasets)

    def again(self) -> Viewer:
        """The same at the next moment."""
        return replace(self)

    @cached_property
    def run_folders(self) -> list[RunFolder]:
        """The viewer's runs, the oldest first."""
        return self.context.owned(self.caller, self.context.place.runs())

    @cached_property
    def _newest_runs(self) -> tuple[list[RunView], str | None]:
        return self._runs(None)

    def _runs(self, cursor: str | None) -> tuple[list[RunView], str | None]:
        shown, older = newest_first(self.run_folders, cursor, _RUNS_SHOWN)
        return readable(run_view, shown), older

    def runs(self, cursor: str | None = None) -> tuple[list[RunView], str | None]:
        """A page of the viewer's runs, the newest first, and where the next one begins."""
        return self._newest_runs if cursor is None else self._runs(cursor)

    def picked_run(self, choice: Choice) -> RunView | None:
        """The run that is chosen, or the newest."""
        if choice.run is not None:
            return run_view(self.context.run(self.caller, choice.run))
        runs, _ = self.runs()
        return runs[0] if runs else None


def picked_dataset(generation: Generation | None, choice: Choice, run: RunView | None) -> (
    DatasetView | None
):  # fmt: skip
    """The data set that is chosen, or the run's, or that of the newest batch, or the first."""
    known = {dataset.name: dataset for dataset in generation.datasets} if generation else {}
    wanted = [choice.dataset]
    if choice.dataset is None and generation is not None:
        wanted += [run.request.get("dataset") if run else None]
        wanted += [batch.dataset for batch in generation.batches] + list(known)
    return next((known[name] for name in wanted if name in known), None)


def overview(viewer: Viewer, choice: Choice) -> str:
    """Figures of everything in one row: generation, store, training, and their ratio."""
    generation, absence = viewer.generation()
    run = viewer.picked_run(choice)
    return render(
        "overview.html",
        generation=generation,
        absence=absence,
        dataset=picked_dataset(generation, choice, run),
        run=run,
        eta_s=_eta_s(run) if run else None,
        free_bytes=_free_bytes(viewer.context),
    )


def _eta_s(run: RunView) -> float | None:
    """Seconds that the steps left take at the pace of the newest one."""
    if not run.step or not run.images_per_s:
        return None
    return (run.max_steps - run.step) * run.images_seen / run.step / run.images_per_s


def generation(viewer: Viewer, choice: Choice) -> str:
    """The newest batches, and who works on them."""
    del choice
    found, _ = viewer.generation()
    return render("generation.html", generation=found, max_workers=_WORKERS_SHOWN)


def runs(viewer: Viewer, choice: Choice) -> str:
    """A page of runs, and the curves of the one that is chosen."""
    shown, older = viewer.runs(choice.older_runs)
    run = viewer.picked_run(choice)
    curves = []
    if run is not None:
        lines = thinned_metrics(viewer.context.run(viewer.caller, run.id).metrics)
        curves = [found for name, title in _CURVES if (found := curve(title, lines, name))]
    return render(
        "runs.html", runs=shown, older=older, run=run, curves=curves, choice=choice,
        may_submit=viewer.caller.has("submit"),
    )  # fmt: skip


def images(viewer: Viewer, choice: Choice) -> str:
    """A page of groups of the chosen data set, the newest first."""
    generation, absence = viewer.generation()
    dataset = picked_dataset(generation, choice, viewer.picked_run(choice))
    page, problem = GroupPage((), None), ""
    if dataset is not None:
        key = viewer.keys.generator
        try:
            if choice.before is None:
                page = viewer.generator.newest_groups(key, dataset, _GROUPS_SHOWN)
            else:
                page = viewer.generator.groups(key, dataset, choice.before, _GROUPS_SHOWN)
        except ServiceError as error:
            problem = str(error)
    return render(
        "images.html",
        datasets=generation.datasets if generation else (),
        max_links=_LINKS_SHOWN,
        dataset=dataset,
        page=page,
        is_absent=absence is not None,
        problem=problem,
        choice=choice,
    )


def probes(viewer: Viewer, choice: Choice) -> str:
    """Scores of the chosen run over its checkpoints, and its probes that are not completed."""
    context, caller = viewer.context, viewer.caller
    folders, _ = newest_first(context.owned(caller, context.place.probes()), None, _PROBES_READ)
    judged, others = judged_by(folders)
    listed, _ = viewer.runs()
    run_id = choice.run or (listed[0].id if listed else "")
    objectives = {one.id: one.request["objective"] for one in listed}
    waiting = [view for view in readable(probe_view, others) if _is_of(view, run_id)]
    return render(
        "probes.html",
        run_id=run_id,
        charts=charts(run_id, judged, objectives),
        waiting=waiting[:_WAITING_SHOWN],
    )


def _is_of(probe: ProbeView, run_id: str) -> bool:
    return probe.request["run_id"] == run_id or f"runs/{run_id}/" in (probe.checkpoint or "")


def comparisons(viewer: Viewer, choice: Choice) -> str:
    """The table of the chosen comparison, or of the newest; raises 404."""
    folder = reports(viewer.context)
    names = newest_names(folder, _COMPARISONS_LISTED)
    name, table = choice.comparison or next(iter(names), None), None
    if name is not None:
        try:
            table = read_table(folder / f"{name}{SUFFIX}")
        except FileNotFoundError:
            raise not_found("comparison") from None
    return render(
        "comparisons.html", names=names, name=name, table=table, choice=choice,
        max_links=_LINKS_SHOWN,
    )  # fmt: skip


def feature_map(viewer: Viewer, choice: Choice) -> str:
    """The chosen run's images as its newest judged checkpoint sees them."""
    run = viewer.picked_run(choice)
    found = (
        None if run is None else read_feature_map(viewer.context.run(viewer.caller, run.id).path)
    )
    if found is not None and viewer.sees(found.dataset):
        return drawing(found)
    return render("feature_map.html", map=None, hidden=found.dataset if found else "")


def neighbours(viewer: Viewer, gid: str) -> str:
    """The images of other captions nearest to a group's, by the newest run whose map has it."""
    shown, _ = newest_first(viewer.run_folders, None, _RUNS_SHOWN)
    for found in filter(None, (read_feature_map(folder.path) for folder in shown)):
        near = found.neighbours(gid, _NEIGHBOURS_SHOWN)
        if near and viewer.sees(found.dataset):
            return render("neighbours.html", neighbours=near, step=found.step)
    return ""


PARTS: Mapping[str, Callable[[Viewer, Choice], str]] = {
    "overview": overview,
    "images": images,
    "generation": generation,
    "runs": runs,
    "probes": probes,
    "comparisons": comparisons,
    "map": feature_map,
}
"""By name, in the order in which they stand; each is kept fresh while the page is open."""


def _free_bytes(context: Context) -> int | None:
    """Room on the disk of the data sets, None where they are in an object store."""
    root = context.settings.root
    if not isinstance(root, Path) or not root.is_dir():
        return None
    return shutil.disk_usage(root).free
