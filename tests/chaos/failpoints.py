"""Which process dies at which named step: every process that starts carries a step it may die at.

A failpoint counts as reached when its marker is there; then the next start gets another one.
"""

from __future__ import annotations

import random
from pathlib import Path

from synthrep_shared.failpoints import NAMES

_OF_THE_API = ("batch-written", "batch-published")
_OF_A_RECONCILER = ("chunk-registered", "chunk-enqueued", "lost-chunk-forgotten")


def owner(name: str) -> str:
    """The kind of process that is to die there; others may pass the place too."""
    if name in _OF_THE_API:
        return "api"
    return "reconciler" if name in _OF_A_RECONCILER else "worker"


class Failpoints:
    """Deals the names that are left to processes as they start."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._order = sorted(NAMES)
        rng.shuffle(self._order)
        self._carried: dict[str, str] = {}

    def reached(self) -> set[str]:
        """Names at which a process has died."""
        return {name for name in self._order if (self._folder / name).exists()}

    def missing(self) -> set[str]:
        """Names at which none has died yet."""
        return set(NAMES - self.reached())

    def arm(self, service: str, kind: str) -> dict[str, str]:
        """Environment for a start of `service`: the name that the fewest others carry."""
        self._carried.pop(service, None)
        missing = self.missing()
        names = [name for name in self._order if name in missing and owner(name) == kind]
        if not names:
            return {}
        carried = list(self._carried.values())
        name = min(names, key=carried.count)
        self._carried[service] = name
        marker = str(self._folder / name)
        return {"SYNTHREP_FAILPOINT": name, "SYNTHREP_FAILPOINT_MARKER": marker}

    def idle(self, service: str, kind: str) -> bool:
        """Whether a new start of `service` would carry a name that is missing and it does not."""
        missing = {name for name in self.missing() if owner(name) == kind}
        return bool(missing) and self._carried.get(service) not in missing
