"""The front door: a batch is refused whole, or durable before the caller hears of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from synthrep_generator.backlog import LiveWork
from synthrep_generator.catalog import Catalog
from synthrep_generator.errors import (
    DatasetDeniedError,
    DiskReserveError,
    HighWaterError,
    IdempotencyConflictError,
    IntakeError,
    ModelFilesMissingError,
    UnknownModelError,
)
from synthrep_generator.intake import (
    BatchHeader,
    IntakeReader,
    batch_id_from_key,
    has_batch,
    write_batch,
)
from synthrep_generator.judge_files import check_judges
from synthrep_generator.model_catalogue import CATALOGUE
from synthrep_generator.model_files import check_recipe, find_model, pull_command, usable_models
from synthrep_generator.quotas import check_quotas, has_quotas, owner_lock
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_shared.keys import Principal
from synthrep_shared.messages import MAX_PROMPTS_PER_REQUEST, GenerationSettings
from synthrep_shared.storage import DatasetPaths, free_bytes
from synthrep_shared.tracing import NoTracer, Tracer

logger = logging.getLogger(__name__)
_LONGEST_WAIT_S = 3600


@dataclass(frozen=True)
class Order:
    """What a request asks for, but for the prompts themselves, whose `digest_prompts` it has."""

    dataset: str
    settings: GenerationSettings
    priority: int
    num_prompts: int
    prompts_digest: str
    caller: Principal
    idempotency_key: str | None

    @property
    def digest(self) -> str:
        """Equal for equal requests, whatever the service's defaults are by now."""
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        asked = [settings, self.priority, self.prompts_digest]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def spool_line(prompt: str) -> bytes:
    """A prompt as a line of its own."""
    return json.dumps(prompt).encode() + b"\n"


def digest_prompts(prompts: Iterable[str]) -> str:
    """Hex sha256 of the prompts in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(spool_line(prompt))
    return digest.hexdigest()


def fill_defaults(asked: GenerationSettings, model: ModelConfig) -> GenerationSettings:
    """The settings, of no mixture, with what the client left open taken from the model."""
    filled = {
        name: getattr(model, name) if getattr(asked, name) is None else getattr(asked, name)
        for name in ("guidance_scale", "num_inference_steps", "scheduler")
    }
    fields = {name: getattr(asked, name) for name in GenerationSettings.model_fields}
    return GenerationSettings(**{**fields, **filled})


class Admission:
    """Takes batches in, within quotas, the high-water mark and the disk reserve.

    Past the mark nothing is taken until the work in hand has come down to the low water, so that
    clients meet a door that is open or shut and not one that flutters. Quotas hold over all
    processes of a root in a file system.
    """

    def __init__(
        self,
        settings: GeneratorSettings,
        catalog: Catalog,
        live: LiveWork,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings, self._tracer = settings, tracer or NoTracer()
        self._catalog = catalog
        self._live = live
        self._lock = threading.Lock()
        self._reserved: Counter[str] = Counter()
        self._is_shut = False

    def check_model(self, alias: str) -> ModelConfig:
        """The model of this alias; raises UnknownModelError."""
        try:
            return find_model(self._settings, alias)
        except (UnknownModelError, ModelFilesMissingError) as error:
            known = ", ".join(sorted(usable_models(self._settings))[:20])
            step = f"; {pull_command(alias)} where the workers are" if alias in CATALOGUE else ""
            raise UnknownModelError(f"the model is not here; known: {known}{step}") from error

    def complete(self, asked: GenerationSettings) -> GenerationSettings:
        """The settings with every default of the model, or of a mixture's models, filled in.

        Raises UnknownModelError, ModelConfigError and JudgeMissingError.
        """
        variants = []
        for variant in asked.variants():
            model = self.check_model(variant.model)
            check_judges(variant, self._settings, model)
            filled = fill_defaults(variant, model)
            check_recipe(model, scheduler=filled.scheduler, negative_prompt=filled.negative_prompt)
            variants.append(filled)
        if not asked.mixture:
            return variants[0]
        parts = zip(asked.mixture, variants, strict=True)
        return asked.model_copy(update={"mixture": tuple(c.completed(v) for c, v in parts)})

    def check_room(self, caller: Principal, dataset: str, idempotency_key: str | None) -> None:
        """Raises what `accept` would raise for one prompt of the caller's now.

        A request that may be a repeated one takes no room; `accept` tells.
        """
        if idempotency_key is not None:
            batch_id = batch_id_from_key(caller.owner, dataset, idempotency_key)
            if has_batch(DatasetPaths(self._catalog.root, dataset), batch_id):
                return
        self._check_reach(caller, dataset)
        with self._room_for(caller, 1):
            pass

    def accept(self, order: Order, prompts: Iterable[str]) -> BatchHeader:
        """Make the batch durable and return its header, or that of the same request's first time.

        Raises what `complete` raises, IdempotencyConflictError, DatasetDeniedError, HighWaterError,
        DiskReserveError; in each case nothing of the batch is visible.
        """
        began = time.monotonic()
        settings = self.complete(order.settings)
        key = order.idempotency_key
        batch_id = secrets.token_hex(16)
        if key is not None:
            batch_id = batch_id_from_key(order.caller.owner, order.dataset, key)
            earlier = self._earlier(order, batch_id)
            if earlier is not None:
                return earlier
        header = BatchHeader(
            id=batch_id,
            dataset=order.dataset,
            owner=order.caller.owner,
            priority=order.priority,
            num_prompts=order.num_prompts,
            settings=settings,
            body_sha256=order.digest,
            created_at=datetime.now(UTC),
        )
        self._check_reach(order.caller, order.dataset)
        with self._room_for(order.caller, order.num_prompts):
            index = self._catalog.make(order.dataset)
            gate = self._quota_gate(order.caller, order.num_prompts)
            if write_batch(index.paths, header, prompts, gate):
                index.register(header)
                self._note(header, time.monotonic() - began)
                return header
        earlier = self._earlier(order, batch_id)
        if earlier is None:
            raise IntakeError(f"intake file {batch_id} vanished")
        return earlier

    def _note(self, header: BatchHeader, seconds: float) -> None:
        facts: dict[str, Any] = {
            "batch": header.id, "dataset": header.dataset, "prompts": header.num_prompts,
        }  # fmt: skip
        logger.info("batch accepted", extra=facts)
        self._tracer.record("accept batch", about=header.id, seconds=seconds, is_root=True, **facts)

    def _earlier(self, order: Order, batch_id: str) -> BatchHeader | None:
        try:
            header = IntakeReader(DatasetPaths(self._catalog.root, order.dataset), batch_id).header
        except FileNotFoundError:
            return None
        if header.body_sha256 != order.digest:
            raise IdempotencyConflictError("the Idempotency-Key was used with another body")
        return header

    def _check_reach(self, caller: Principal, dataset: str) -> None:
        is_within_reach = caller.is_admin or caller.lists(dataset)
        if not is_within_reach and caller.datasets is None:
            index = self._catalog.dataset(dataset)
            is_within_reach = index is None or index.owner in (None, caller.owner)
        if not is_within_reach:
            raise DatasetDeniedError("the key may not write to this data set; choose another name")

    @contextmanager
    def _room_for(self, caller: Principal, num_prompts: int) -> Iterator[None]:
        """Holds room for the prompts, so that concurrent requests cannot pass a mark together."""
        with self._lock:
            try:
                if has_quotas(caller):
                    self._check_quotas(caller, num_prompts, self._reserved[caller.owner])
                self._check_mark(num_prompts)
            except HighWaterError as error:
                if error.retry_after_s is None and error.excess is not None:
                    error.retry_after_s = self._seconds_for(error.excess)
                raise
            if free_bytes(self._catalog.root) < self._settings.reserve_bytes:
                raise DiskReserveError("the disk has less than its reserve left; send this later")
            self._reserved[caller.owner] += num_prompts
        try:
            yield
        finally:
            with self._lock:
                self._reserved[caller.owner] -= num_prompts

    def _check_quotas(self, caller: Principal, num_prompts: int, coming: int) -> None:
        batches = (batch for index in self._catalog.datasets() for batch in index.batches())
        now = datetime.now(UTC)
        check_quotas(caller, batches, coming=coming, num_prompts=num_prompts, now=now)

    @contextmanager
    def _quota_gate(self, caller: Principal, num_prompts: int) -> Iterator[None]:
        """Counts once more, with the batches that other processes published meanwhile."""
        if not has_quotas(caller):
            yield
            return
        with owner_lock(self._catalog.root, caller.owner):
            for index in self._catalog.datasets():
                index.scan_intake()
            self._check_quotas(caller, num_prompts, coming=0)
            yield

    def _check_mark(self, num_prompts: int) -> None:
        waiting = self._catalog.unfinished().prompts + self._reserved.total()
        high = self._settings.high_water_prompts
        low = int(high * self._settings.low_water_fraction)
        # A large upload that does not fit shuts out nobody whose request does.
        usual = min(num_prompts, MAX_PROMPTS_PER_REQUEST)
        self._is_shut = (self._is_shut and waiting > low) or waiting + usual > high
        left = min(low, high - num_prompts) if self._is_shut else high - num_prompts
        if waiting > left:
            raise HighWaterError(
                f"{waiting} prompts are accepted and unfinished, the mark is {high}; send "
                f"{num_prompts} more once {max(left, 0)} are left",
                excess=waiting - left,
            )

    def _seconds_for(self, num_prompts: int) -> int | None:
        """What the live workers take for so many prompts; None while their speed is unknown."""
        left = self._catalog.unfinished()
        images_per_s = sum(worker.images_per_s or 0.0 for worker in self._live.workers())
        if not images_per_s or not left.prompts:
            return None
        seconds = num_prompts * left.images / left.prompts / images_per_s
        return min(max(1, math.ceil(seconds)), _LONGEST_WAIT_S)
