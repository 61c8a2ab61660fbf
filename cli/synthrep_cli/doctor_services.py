"""What `synthrep doctor` asks of Redis, the store, the model cache and the services.

`ask_…` goes there and returns facts or an offset of clocks; `check_…` judges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import httpx

from synthrep_cli.doctor_findings import Finding
from synthrep_shared.errors import StorageError
from synthrep_shared.object_store import ObjectPath, probe_store

if TYPE_CHECKING:
    from redis import Redis

    from synthrep_generator.settings import GeneratorSettings

_TIMEOUT_S = 3.0
_NOTABLE_SKEW_S, _BAD_SKEW_S = 5.0, 60.0


class RedisFacts(NamedTuple):
    """What Redis says of itself."""

    version: str
    eviction: str
    """Its maxmemory-policy."""
    is_append_only: bool
    last_writes: tuple[str, ...]
    """`ok` for each kind of file that it wrote last."""
    ahead_s: float
    """How much its clock is ahead of ours."""


def ask_redis(redis: Redis, clock: Callable[[], float] = time.time) -> RedisFacts:
    """Raises redis.RedisError where there is no answer, or none for us."""
    before = clock()
    seconds, microseconds = redis.time()
    ahead_s = seconds + microseconds / 1e6 - (before + clock()) / 2
    memory, kept = redis.info("memory"), redis.info("persistence")
    return RedisFacts(
        version=str(redis.info("server").get("redis_version")),
        eviction=str(memory.get("maxmemory_policy")),
        is_append_only=bool(kept.get("aof_enabled")),
        last_writes=tuple(
            str(kept.get(name, "ok"))
            for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        ),
        ahead_s=ahead_s,
    )


def check_redis(url: str, answer: RedisFacts | Exception, *, is_configured: bool) -> Finding:
    """Whether Redis answers; that nobody is at the default address is no fault by itself."""
    parts = urlsplit(url)
    place = f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path
    if isinstance(answer, RedisFacts):
        return Finding(check="Redis", state="ok", found=f"{answer.version} at {place}")
    if is_configured:
        return Finding(
            check="Redis", state="fail", found=f"no use at {place}: {answer}",
            next_step="start it (docker compose up -d redis), or correct "
            "SYNTHREP_GENERATOR_REDIS_URL; what was accepted waits on disk",
        )  # fmt: skip
    return Finding(
        check="Redis", state="warn", found=f"nobody answers at {place}, the default",
        next_step="`synthrep up` brings its own; services apart from it need "
        "SYNTHREP_GENERATOR_REDIS_URL",
    )  # fmt: skip


def check_eviction(policy: str) -> Finding:
    """Whether Redis keeps queued work when its memory is full."""
    if policy != "noeviction":
        return Finding(
            check="Redis eviction", state="fail",
            found=f"maxmemory-policy is {policy}, which drops queued work: services do not start",
            next_step="redis-cli config set maxmemory-policy noeviction, and in its configuration",
        )  # fmt: skip
    return Finding(check="Redis eviction", state="ok", found="maxmemory-policy is noeviction")


def check_persistence(facts: RedisFacts) -> Finding:
    """Whether Redis keeps the work in hand over a restart of its own."""
    if any(status != "ok" for status in facts.last_writes):
        return Finding(
            check="Redis persistence", state="fail", found="its last write to disk failed",
            next_step="look at its log and its disk; it may refuse every write until then",
        )  # fmt: skip
    if not facts.is_append_only:
        return Finding(
            check="Redis persistence", state="warn",
            found="no append-only file: after a restart the work in hand is queued again",
            next_step="redis-cli config set appendonly yes, and in its configuration",
        )  # fmt: skip
    return Finding(check="Redis persistence", state="ok", found="append-only file")


def check_store(root: ObjectPath) -> Finding:
    """Whether the object store answers, and never writes over an object that is to stay."""
    try:
        probe_store(root)
    except StorageError as error:
        found, _, step = str(error).rpartition("; ")
        return Finding(
            check="object store", state="fail", found=found or step,
            next_step=step if found else "",
        )  # fmt: skip
    return Finding(check="object store", state="ok", found=f"{root}, with conditional writes")


def check_model(settings: GeneratorSettings, alias: str) -> Finding:
    """Whether the files of a configured model are here and as large as they should be."""
    from synthrep_generator.errors import ModelFilesMissingError
    from synthrep_generator.model_catalogue import CATALOGUE
    from synthrep_generator.model_files import check_model_files, pull_command

    model, name = settings.models[alias], f"model {alias}"
    try:
        check_model_files(alias, model)
    except ModelFilesMissingError as error:
        if alias not in CATALOGUE:
            step = "put its files there, or change SYNTHREP_GENERATOR_MODELS"
            return Finding(check=name, state="fail", found=str(error), next_step=step)
        found = f"its files are not in {model.path}, or not whole"
        return Finding(check=name, state="fail", found=found, next_step=pull_command(alias))
    return Finding(check=name, state="ok", found=f"its files are in {model.path}")


class ServiceAnswer(NamedTuple):
    """What a service answered to `/readyz`."""

    is_ready: bool
    problem: str
    ahead_s: float | None
    """How much its clock is ahead of ours, to a second; None without a `Date`."""


def ask_service(
    url: str,
    *,
    clock: Callable[[], float] = time.time,
    transport: httpx.BaseTransport | None = None,
) -> ServiceAnswer:
    """Raises httpx.TransportError where nobody answers."""
    before = clock()
    with httpx.Client(timeout=_TIMEOUT_S, transport=transport) as http:
        response = http.get(f"{url}/readyz")
    ahead_s = None
    if "date" in response.headers:
        cut_off_s = 0.5  # on average
        told = parsedate_to_datetime(response.headers["date"]).timestamp() + cut_off_s
        ahead_s = told - (before + clock()) / 2
    problem = "" if response.is_success else response.text
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        problem = str(response.json().get("detail", ""))
    return ServiceAnswer(response.is_success, problem, ahead_s)


def check_service(name: str, url: str, answer: ServiceAnswer | httpx.TransportError) -> Finding:
    """Whether a service is there and ready; that none is there is no fault of the machine."""
    if isinstance(answer, ServiceAnswer):
        if answer.is_ready:
            return Finding(check=name, state="ok", found=f"ready at {url}")
        return Finding(
            check=name, state="fail", found=f"at {url}, and not ready: {answer.problem}",
            next_step="look at its log",
        )  # fmt: skip
    return Finding(
        check=name, state="warn", found=f"nobody answers at {url}",
        next_step=f"start it with `synthrep up`, or set SYNTHREP_{name.upper()}_URL",
    )  # fmt: skip


def check_clock(ahead_s: Mapping[str, float]) -> Finding:
    """Whether this machine and the others agree on the time; seconds that each is ahead."""
    if not ahead_s:
        return Finding(check="clock", state="ok", found="nobody answers to compare it with")
    name = max(ahead_s, key=lambda name: abs(ahead_s[name]))
    skew_s = ahead_s[name]
    if abs(skew_s) <= _NOTABLE_SKEW_S:
        return Finding(check="clock", state="ok", found=f"agrees with {', '.join(ahead_s)}")
    where = "ahead" if skew_s > 0 else "behind"
    return Finding(
        check="clock", state="fail" if abs(skew_s) > _BAD_SKEW_S else "warn",
        found=f"{name} is {abs(skew_s):,.0f} s {where} of this machine: ages of files and quotas "
        "are wrong, and object stores refuse at 15 minutes",
        next_step="synchronise both: timedatectl set-ntp true",
    )  # fmt: skip
