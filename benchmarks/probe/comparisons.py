"""The solver against scikit-learn on the same features; lambda = 1 / C, intercept free.

Objectives are compared one-sidedly, at each strength, as (ours - theirs) / theirs. Times are
processor seconds on one thread, so that they hold on a loaded machine, each in a fresh process.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Dose, Measured, case, in_process, interleave, wall_s
from benchmarks.probe.fits import Name, Size, fit_s, peak_megabytes
from synthrep_trainer.linear_probe import STRENGTHS

_LBFGS = "scikit-learn LogisticRegression, lbfgs"
_PATH = tuple(s for s in STRENGTHS if 5 < s < 1.1e4)
_ALL = Size(2000, 128, 20)
_USUAL, _USUAL_QUICK = Size(5000, 384, 100), Size(2000, 128, 20)
_LARGE, _LARGE_QUICK = Size(50_000, 768, 100), Size(10_000, 256, 50)
_LARGE_STRENGTHS = (1e2, 1e3, 1e4)
_PUBLISHED_TOLERANCE = 1e-12
_EQUAL = 1e-4  # of the objective, by which the peer may be worse
_TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6)  # from its default on


class Judged(NamedTuple):
    """What a solver reached, by strength from the weak to the strong end."""

    objectives: list[float]
    accuracies: list[float]
    converged: list[bool]
    seconds: float


@functools.cache
def _judged(name: Name, size: Size, strengths: tuple[float, ...], tolerance: float) -> Judged:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judged.json"
        given: dict[str, Any] = {"name": name, "size": size, "strengths": strengths}
        seconds = in_process(fit_s, tolerance=tolerance, output=str(path), **given)
        found = json.loads(path.read_text())
    rows = [found[repr(strength)] for strength in strengths]
    return Judged(
        [row["objective"] for row in rows],
        [row["accuracy"] for row in rows],
        [row["converged"] for row in rows],
        seconds,
    )


def _excess(ours: Judged, theirs: Judged) -> list[float]:
    pairs = zip(ours.objectives, theirs.objectives, strict=True)
    return [(one - other) / other for one, other in pairs]


def _both(dose: Dose) -> tuple[Judged, Judged, tuple[float, ...]]:
    strengths = STRENGTHS[:: dose.size(1, 11)]
    ours = _judged("ours", _ALL, strengths, 0.0)
    return ours, _judged("reference", _ALL, strengths, _PUBLISHED_TOLERANCE), strengths


@case("excess of the objective, worst of 45 strengths", unit="of the objective", peer=_LBFGS,
      higher_is_better=False, max_value=1e-3)  # fmt: skip
def objective(dose: Dose) -> Measured:
    """With scikit-learn in fp64, 1,000 iterations and the tolerance of the published protocol."""
    ours, theirs, strengths = _both(dose)
    excess = _excess(ours, theirs)
    worst = max(range(len(excess)), key=excess.__getitem__)
    reason = (
        f"worst at {strengths[worst]:.2g}, best {min(excess):.1e}; scikit-learn says it converged "
        f"at {sum(theirs.converged)} of {len(strengths)}"
    )
    return Measured(excess[worst], None, 1, reason)


@case("difference of accuracy, worst of 45 strengths", unit="of the test rows", peer=_LBFGS,
      higher_is_better=False, max_value=5e-3)  # fmt: skip
def accuracy(dose: Dose) -> Measured:
    """Where scikit-learn has converged."""
    ours, theirs, strengths = _both(dose)
    gaps = [
        abs(one - other)
        for one, other, is_converged in zip(
            ours.accuracies, theirs.accuracies, theirs.converged, strict=True
        )
        if is_converged
    ]
    return Measured(max(gaps), None, 1, f"{len(gaps)} of {len(strengths)} strengths compared")


def _compare(dose: Dose, peer: Name, tolerance: float) -> Measured:
    size = _USUAL_QUICK if dose.is_quick else _USUAL
    ours, theirs = _judged("ours", size, _PATH, 0.0), _judged(peer, size, _PATH, tolerance)
    excess = _excess(ours, theirs)
    given: dict[str, Any] = {"size": size, "strengths": _PATH}
    reason = f"our objective - theirs: {min(excess):.1e} to {max(excess):.1e} of theirs"
    return interleave(
        lambda: in_process(fit_s, name="ours", **given),
        lambda: in_process(fit_s, name=peer, tolerance=tolerance, **given),
        rounds=dose.rounds(3),
        reason=reason,
    )


@case("path of 14 strengths, 5.6 to 1e4", unit="s", peer=f"{_LBFGS}, cold, tol 1e-4",
      higher_is_better=False, min_ratio=2.0)  # fmt: skip
def cold_path(dose: Dose) -> Measured:
    return _compare(dose, "cold", 1e-4)


@case("path of 14 strengths, against a warm one", unit="s",
      peer=f"{_LBFGS}, warm, tol 1e-4", higher_is_better=False)  # fmt: skip
def warm_path(dose: Dose) -> Measured:
    """At its default tolerance, where its objective need not be ours."""
    return _compare(dose, "warm", 1e-4)


@case("path of 14 strengths, against a warm one at equal objective", unit="s",
      peer=f"{_LBFGS}, warm, loosest tol with our objective", higher_is_better=False,
      min_ratio=1.2)  # fmt: skip
def warm_path_at_equal_objective(dose: Dose) -> Measured:
    """The loosest tolerance at which its objective exceeds ours by at most 1e-4 of it anywhere."""
    size = _USUAL_QUICK if dose.is_quick else _USUAL
    ours = _judged("ours", size, _PATH, 0.0)
    for tolerance in _TOLERANCES:
        if max(_excess(_judged("warm", size, _PATH, tolerance), ours)) <= _EQUAL:
            break
    found = _compare(dose, "warm", tolerance)
    return replace(found, reason=f"tol {tolerance:g}; {found.reason}")


@case("memory of 50,000 x 768, 100 classes, 3 strengths", unit="MB", peer="",
      higher_is_better=False, max_value=4000.0)  # fmt: skip
def memory(dose: Dose) -> Measured:
    size = _LARGE_QUICK if dose.is_quick else _LARGE
    found: list[float] = []
    seconds = wall_s(
        lambda: found.append(in_process(peak_megabytes, size=size, strengths=_LARGE_STRENGTHS))
    )
    return Measured(found[0], None, 1, f"peak of the process; {seconds:.0f} s by the clock")
