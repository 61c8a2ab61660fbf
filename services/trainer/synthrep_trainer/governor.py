"""Holds generation back while it is far ahead of training, through the generator's API.

The trainer's side of the ratio is in `shard_stream`: it waits. This is the other side: above a
number of images that wait to be trained on, every unfinished batch of the data set is paused, new
ones as they come, and all are resumed when half of them are used, when the stream waits for new
images, and when the train process ends.

`paused.json` in the run's folder has the batches that this run pauses, written before it asks; so
a run that goes on after a kill resumes them in its turn, and a batch that somebody else paused is
left paused. A run whose process dies and never starts again leaves its batches paused:
`POST /v1/batches/{id}/resume` lets them go on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.storage import publish_bytes
from synthrep_trainer.shard_stream import Pressure

_log = logging.getLogger(__name__)
_ACTIVE = ("queued", "running")


class Governor:
    """Looks at the stream every `interval_s` in a thread of its own; use as a context manager."""

    def __init__(
        self,
        client: SynthRep,
        dataset: str,
        run_folder: Path,
        pressure: Callable[[], Pressure],
        *,
        pause_above: int,
        interval_s: float,
    ) -> None:
        """`pause_above` is a number of committed images that were not trained on."""
        self._client, self._dataset, self._pressure = client, dataset, pressure
        self._pause_above, self._interval_s = pause_above, interval_s
        self._file = run_folder / "paused.json"
        self._paused = _read(self._file)
        self._is_holding = bool(self._paused)
        self.pauses = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="governor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Lets generation go on; a generator that does not answer is told by the next attempt."""
        self._stop.set()
        self._thread.join()
        self._try(self._release)

    def look(self) -> None:
        """Decide once, and ask the generator for it; raises ServiceError, OSError."""
        images, is_waiting = self._pressure()
        limit = self._pause_above // 2 if self._is_holding else self._pause_above
        self._is_holding = images > limit and not is_waiting
        if self._is_holding:
            self._hold()
        else:
            self._release()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._try(self.look)

    def _try(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except Exception as error:  # whatever was answered: generation is a matter of its own
            reason = f"{type(error).__name__}: {error}"
            _log.warning("generator_not_governed", extra={"reason": reason})

    def _hold(self) -> None:
        batches = self._client.batches(self._dataset)
        active = [batch.id for batch in batches if batch.state in _ACTIVE]
        if not active:
            return
        self._remember(self._paused | set(active))
        self._tell(active, "pause")
        self.pauses += 1
        _log.info("generation_paused", extra={"dataset": self._dataset, "batches": len(active)})

    def _release(self) -> None:
        if not self._paused:
            return
        self._tell(sorted(self._paused), "resume")
        _log.info("generation_resumed", extra={"batches": len(self._paused)})
        self._remember(set())

    def _tell(self, batches: list[str], verb: str) -> None:
        for batch in batches:
            try:
                self._client.control(batch, verb)
            except ServiceUnavailableError:
                raise
            except ServiceError as error:  # this one is not ours to pause; the others may be
                _log.warning("batch_not_governed", extra={"batch": batch, "reason": str(error)})

    def _remember(self, batches: set[str]) -> None:
        publish_bytes(json.dumps(sorted(batches)).encode(), self._file, replace=True)
        self._paused = batches


def _read(file: Path) -> set[str]:
    try:
        return set(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return set()
