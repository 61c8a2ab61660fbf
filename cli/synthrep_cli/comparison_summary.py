"""Results of a comparison as a table with verdicts, and what they say in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synthrep_cli.comparison_config import BASELINES
from synthrep_cli.comparison_rows import ResultRow
from synthrep_cli.comparison_statistics import (
    MIN_SEEDS,
    PIXELS,
    Estimate,
    Hits,
    Verdict,
    judge,
    unpack_hits,
)

METHOD = ("stablerep", "stablerep+")


@dataclass(frozen=True)
class Summary:
    """Means by set and row, and a verdict for each set that has a trained row."""

    means: dict[str, dict[str, Estimate]]
    verdicts: dict[str, Verdict]
    seeds: dict[str, list[int]]
    """Seeds of each trained row that have a result on every set that is there."""

    def as_json(self) -> list[dict[str, Any]]:
        """The field `summary` of `report.json`."""
        return [
            {
                "dataset": name, "row": row, "mean": found.mean, "ci95": list(found.ci95),
                "best": self.is_best(name, row),
                "significant": self.is_best(name, row) and self.verdicts[name].is_significant,
            }
            for name, rows in self.means.items()
            for row, found in rows.items()
        ]  # fmt: skip

    def is_best(self, name: str, row: str) -> bool:
        """Whether a row has the highest mean of a set; raw pixels are no contender."""
        return name in self.verdicts and self.verdicts[name].best == row


def summarise(results: Sequence[ResultRow]) -> Summary:
    """Everything that can be computed of the results that are there."""
    means, verdicts = {}, {}
    for name in sorted({r.dataset for r in results}):
        of_set = [r for r in results if r.dataset == name]
        hits: dict[str, dict[int, Hits]] = {}
        for r in of_set:
            hits.setdefault(r.row, {})[r.seed] = unpack_hits(r.hits, r.n_test)
        means[name], verdict = judge(
            hits,
            of_set[0].class_sizes,
            by_class=of_set[0].metric == "mean_per_class",
            candidates=[row for row in hits if row != PIXELS],
        )
        if verdict is not None:
            verdicts[name] = verdict
    return Summary(means, verdicts, _seeds(results))


def _seeds(results: Sequence[ResultRow]) -> dict[str, list[int]]:
    sets = {r.dataset for r in results}
    found: dict[str, list[int]] = {}
    for row in dict.fromkeys(r.row for r in results if r.row not in BASELINES):
        per_seed: dict[int, set[str]] = {}
        for r in results:
            if r.row == row:
                per_seed.setdefault(r.seed, set()).add(r.dataset)
        found[row] = sorted(seed for seed, there in per_seed.items() if there == sets)
    return found


def statement(summary: Summary, rows: Sequence[str], num_seeds: int) -> list[str]:
    """What the evidence says, also where it goes against the method; a sentence each."""
    said = []
    late = [r for r in rows if r not in BASELINES and len(summary.seeds.get(r, ())) < num_seeds]
    if late:
        said.append(f"This table is not complete: {', '.join(late)} lack results.")
    if all(len(seeds) < MIN_SEEDS for seeds in summary.seeds.values()):
        said.append(
            f"With fewer than {MIN_SEEDS} seeds nothing here is called significant: another seed "
            "may turn every order."
        )
    counted = {n: v for n, v in summary.verdicts.items() if v.is_counted}
    wins = [n for n, v in counted.items() if v.is_significant and v.best in METHOD]
    losses = [n for n, v in counted.items() if v.is_significant and v.best not in METHOD]
    draws = [n for n, v in counted.items() if not v.is_significant]
    said.append(
        f"Of {len(summary.verdicts)} sets {len(counted)} are counted. StableRep or StableRep+ is "
        f"significantly best on {len(wins)} of them{_named(wins)}, another row on "
        f"{len(losses)}{_named(losses)}; {len(draws)} are draws{_named(draws)}."
    )
    said += [
        f"{name}: not counted, {v.why_not}."
        for name, v in summary.verdicts.items()
        if not v.is_counted
    ]
    said += [_sentence(name, v) for name, v in counted.items()]
    said += _against(summary)
    return said


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _sentence(name: str, verdict: Verdict) -> str:
    if verdict.second is None or verdict.difference is None:
        return f"{name}: {verdict.best} has no rival."
    low, high = (100 * bound for bound in verdict.difference.ci95)
    said = "better than" if verdict.is_significant else "ahead of, but not provably better than,"
    return (
        f"{name}: {verdict.best} is {said} {verdict.second}: "
        f"{100 * verdict.difference.mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}."
    )


def _against(summary: Summary) -> list[str]:
    """Sets on which the method stays behind what it ought to beat."""
    said = []
    for row in METHOD:
        for rival, text in (
            (PIXELS, "raw pixels"),
            ("random-init", "an encoder that learned nothing"),
            ("simclr-generated", "SimCLR on the same images"),
        ):
            behind = [
                name
                for name, means in summary.means.items()
                if row in means and rival in means and means[row].mean <= means[rival].mean
            ]
            if behind:
                said.append(f"Against the method: {row} is not above {text}{_named(behind)}.")
    return said


def cost_table(results: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Mean cost of a run of each trained row."""
    runs = {(r.row, r.seed): r.cost for r in results if r.cost is not None}
    table = []
    for row in dict.fromkeys(row for row, _ in runs):
        costs = [cost for (name, _), cost in runs.items() if name == row]
        table.append({
            "row": row, "runs": len(costs), "views": sum(c.views for c in costs) // len(costs),
            "minutes": round(sum(c.train_s for c in costs) / len(costs) / 60, 1),
            "device": costs[0].device,
        })  # fmt: skip
    return table
