"""`synthrep doctor`: what is wrong with this machine and what it is told to use, in words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from synthrep_cli import doctor_machine as machine
from synthrep_cli import doctor_services as services
from synthrep_cli.doctor_findings import Finding
from synthrep_cli.output import Json, errors_in_one_sentence, print_json
from synthrep_shared.client import SynthRep
from synthrep_shared.storage import Location, spool_folder

if TYPE_CHECKING:
    from synthrep_generator.settings import GeneratorSettings
    from synthrep_trainer.settings import TrainerSettings

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(as_json: Json = False) -> None:
    """Look for what commonly goes wrong; exit 1 if anything fails, with what to do about it.

    Looks at this machine, at what the settings name, and at the services of the client's addresses.
    """
    with errors_in_one_sentence(), ExitStack() as stack:
        console = Console()
        if console.is_terminal and not as_json:
            stack.enter_context(console.status("looking …"))
        findings = list(examine())
    if as_json:
        print_json([finding.model_dump() for finding in findings])
    else:
        console.print(_table(findings))
        console.print(_summary(findings))
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Every check, one after the other."""
    yield machine.check_python(machine.python_version())
    yield machine.check_torch(machine.installed_versions())
    yield machine.check_shared_memory(
        machine.SHARED_MEMORY, machine.free_shared_bytes(machine.SHARED_MEMORY)
    )
    try:
        from synthrep_generator.settings import GeneratorSettings
        from synthrep_trainer.settings import TrainerSettings
    except ModuleNotFoundError:
        yield Finding(
            check="services", state="warn", found="not installed here: only the client is",
            next_step="to generate or train here: pip install 'synthrep[up]'",
        )  # fmt: skip
        yield from _services({})
        return
    generator, trainer = GeneratorSettings(), TrainerSettings()
    yield from _devices(generator, trainer)
    yield from _storage(generator, trainer)
    for alias in generator.models:
        yield services.check_model(generator, alias)
    ahead_s: dict[str, float] = {}
    yield from _redis(generator, ahead_s)
    yield from _services(ahead_s)


def _devices(generator: GeneratorSettings, trainer: TrainerSettings) -> Iterator[Finding]:
    if "torch" not in machine.installed_versions():
        return
    try:
        accelerator = machine.find_accelerators()
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            check="device", state="fail", found=f"torch does not load: {error}",
            next_step="install it again: pip install -c constraints.txt torch torchvision",
        )  # fmt: skip
        return
    for wanted in dict.fromkeys((generator.device, trainer.device)):
        yield machine.check_device(wanted, accelerator)


def _storage(generator: GeneratorSettings, trainer: TrainerSettings) -> Iterator[Finding]:
    if isinstance(generator.root, Path):
        yield machine.check_writable("data folder", generator.root)
    else:
        yield services.check_store(generator.root)
    yield _disk("data disk", generator.root, generator.reserve_bytes)
    yield machine.check_writable("runs folder", trainer.runs)
    yield _disk("runs disk", trainer.runs, 0)


def _disk(name: str, root: Location, reserve_bytes: int) -> Finding:
    folder = machine.nearest_folder(root if isinstance(root, Path) else spool_folder(root))
    free = shutil.disk_usage(folder).free
    return machine.check_disk(name, folder, free, reserve_bytes)


def _redis(settings: GeneratorSettings, ahead_s: dict[str, float]) -> Iterator[Finding]:
    """Adds how much its clock is ahead."""
    from redis import RedisError

    from synthrep_generator.queues import WorkQueue

    redis, url = WorkQueue(settings).redis, settings.redis_url.get_secret_value()
    is_configured = "redis_url" in settings.model_fields_set
    try:
        facts = services.ask_redis(redis)
    except RedisError as error:
        yield services.check_redis(url, error, is_configured=is_configured)
        return
    finally:
        redis.close()
    ahead_s["Redis"] = facts.ahead_s
    yield services.check_redis(url, facts, is_configured=is_configured)
    yield services.check_eviction(facts.eviction)
    yield services.check_persistence(facts)


def _services(ahead_s: dict[str, float]) -> Iterator[Finding]:
    """The services, then the clock, which is compared with all that answered."""
    with SynthRep() as client:
        places = {"generator": client.generator_url, "trainer": client.trainer_url}
    for name, url in places.items():
        try:
            answer = services.ask_service(url)
        except httpx.TransportError as error:
            yield services.check_service(name, url, error)
            continue
        if answer.ahead_s is not None:
            ahead_s[f"the {name}"] = answer.ahead_s
        yield services.check_service(name, url, answer)
    yield services.check_clock(ahead_s)


def _table(findings: list[Finding]) -> Table:
    """A row a check; what to do next stands below what was found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        words = Text(finding.found)
        if finding.next_step:
            words.append(f"\n→ {finding.next_step}")
        table.add_row(Text(finding.state, style=_COLOURS[finding.state]), finding.check, words)
    return table


def _summary(findings: list[Finding]) -> str:
    states = [finding.state for finding in findings]
    failed, warned = states.count("fail"), states.count("warn")
    if not failed and not warned:
        return "all is well"
    return f"{len(states)} checks: {failed} failed, {warned} to know about"
