"""The front door: a batch is refused whole, or durable before the caller hears of it."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from synthrep_generator.catalog import Catalog
from synthrep_generator.errors import (
    DiskReserveError,
    HighWaterError,
    IdempotencyConflictError,
    IntakeError,
    UnknownModelError,
)
from synthrep_generator.intake import BatchHeader, IntakeReader, batch_id_from_key, write_batch
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.storage import DatasetPaths


@dataclass(frozen=True)
class Order:
    """What a request asks for, but for the prompts themselves, whose `digest_prompts` it has."""

    dataset: str
    settings: GenerationSettings
    priority: int
    num_prompts: int
    prompts_digest: str
    owner: str
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
    """Takes batches in, within the high-water mark and the disk reserve."""

    def __init__(self, settings: GeneratorSettings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._lock = threading.Lock()
        self._reserved = 0

    def check_model(self, alias: str) -> ModelConfig:
        """The model of this alias; raises UnknownModelError."""
        model = self._settings.models.get(alias)
        if model is None:
            known = ", ".join(sorted(self._settings.models)[:20])
            raise UnknownModelError(f"the model is not configured here; known: {known}")
        return model

    def complete(self, asked: GenerationSettings) -> GenerationSettings:
        """The settings with every default of the model, or of a mixture's models, filled in.

        Raises UnknownModelError.
        """
        variants = [fill_defaults(v, self.check_model(v.model)) for v in asked.variants()]
        if not asked.mixture:
            return variants[0]
        parts = zip(asked.mixture, variants, strict=True)
        return asked.model_copy(update={"mixture": tuple(c.completed(v) for c, v in parts)})

    def check_room(self, num_prompts: int) -> None:
        """Raises HighWaterError or DiskReserveError if so many prompts have no room now."""
        with self._room_for(num_prompts):
            pass

    def accept(self, order: Order, prompts: Iterable[str]) -> BatchHeader:
        """Make the batch durable and return its header, or that of the same request's first time.

        Raises UnknownModelError, IdempotencyConflictError, HighWaterError, DiskReserveError; in
        each case nothing of the batch is visible.
        """
        settings = self.complete(order.settings)
        key = order.idempotency_key
        batch_id = secrets.token_hex(16)
        if key is not None:
            batch_id = batch_id_from_key(order.owner, order.dataset, key)
            earlier = self._earlier(order, batch_id)
            if earlier is not None:
                return earlier
        header = BatchHeader(
            id=batch_id,
            dataset=order.dataset,
            owner=order.owner,
            priority=order.priority,
            num_prompts=order.num_prompts,
            settings=settings,
            body_sha256=order.digest,
            created_at=datetime.now(UTC),
        )
        with self._room_for(order.num_prompts):
            index = self._catalog.make(order.dataset)
            if write_batch(index.paths, header, prompts):
                index.register(header)
                return header
        earlier = self._earlier(order, batch_id)
        if earlier is None:
            raise IntakeError(f"intake file {batch_id} vanished")
        return earlier

    def _earlier(self, order: Order, batch_id: str) -> BatchHeader | None:
        try:
            header = IntakeReader(DatasetPaths(self._catalog.root, order.dataset), batch_id).header
        except FileNotFoundError:
            return None
        if header.body_sha256 != order.digest:
            raise IdempotencyConflictError("the Idempotency-Key was used with another body")
        return header

    @contextmanager
    def _room_for(self, num_prompts: int) -> Iterator[None]:
        """Holds room for the prompts, so that concurrent requests cannot pass the mark together."""
        with self._lock:
            waiting = self._catalog.unfinished().prompts + self._reserved
            limit = self._settings.high_water_prompts
            if waiting + num_prompts > limit:
                raise HighWaterError(
                    f"{waiting} prompts are accepted and unfinished, {num_prompts} more would pass "
                    f"the mark of {limit}; send them later"
                )
            if shutil.disk_usage(self._catalog.root).free < self._settings.reserve_bytes:
                raise DiskReserveError("the disk has less than its reserve left; send this later")
            self._reserved += num_prompts
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= num_prompts
