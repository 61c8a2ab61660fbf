"""That services of the compose file fit together: folders, networks, health checks, Redis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from synthrep_generator.routes_service import router as generator_routes
from synthrep_trainer.routes_service import router as trainer_routes

_ROUTES = {"GENERATOR": generator_routes, "TRAINER": trainer_routes}
_STORE = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_SHARED_CREDENTIALS_FILE")
_FOLDERS = ("_ROOT", "_RUNS", "_HEARTBEAT", "TMPDIR")
_PASSING = ("init", "models-pull")  # end by themselves
Services = dict[str, Any]


def wiring(services: Services) -> Iterator[str]:
    """What is wrong, a line each."""
    roots = set()
    for name, service in services.items():
        environment = service.get("environment") or {}
        kind = name.partition("-")[0].upper()
        if kind in _ROUTES and name not in _PASSING:
            roots.add(environment[f"SYNTHREP_{kind}_ROOT"])
            yield from _folders(name, service, environment)
            yield from _health(name, service, environment, kind)
            missing = [v for v in _STORE if v not in environment]
            yield from (f"{name} is not told {variable}" for variable in missing)
            if "store" not in service["networks"]:
                yield f"{name} cannot reach the object store"
        yield from _networks(name, service, environment, services)
    if len(roots) != 1:
        yield f"services look for data sets in {sorted(roots)}"
    command = " ".join(services["redis"]["command"])
    if "--appendonly yes" not in command or "--maxmemory-policy noeviction" not in command:
        yield "redis would lose work"


def _folders(name: str, service: Any, environment: dict[str, str]) -> Iterator[str]:
    writable = {v["target"] for v in service["volumes"] if not v.get("read_only")}
    writable |= {entry.partition(":")[0] for entry in service["tmpfs"]}
    for variable, value in environment.items():
        above = {str(path) for path in (PurePosixPath(value), *PurePosixPath(value).parents)}
        if variable.endswith(_FOLDERS) and "://" not in value and not writable & above:
            yield f"{name}: {variable} is {value}, where nothing can be written"


def _health(name: str, service: Any, environment: dict[str, str], kind: str) -> Iterator[str]:
    command = " ".join(service["healthcheck"]["test"])
    heartbeat = environment[f"SYNTHREP_{kind}_HEARTBEAT"]
    if not name.endswith("-api"):
        if set(re.findall(r"/tmp/[a-z]+", command)) != {heartbeat}:
            yield f"{name}: its health check does not look at {heartbeat}"
        return
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/[a-z]+)", command)[0]
    paths = {getattr(route, "path", "") for route in _ROUTES[kind].routes}
    if port != environment[f"SYNTHREP_{kind}_PORT"] or path not in paths:
        yield f"{name}: its health check asks {port}{path}"


def _networks(
    name: str, service: Any, environment: dict[str, str], services: Services
) -> Iterator[str]:
    wanted = {other for other in service.get("depends_on", {}) if other not in _PASSING}
    if url := environment.get("SYNTHREP_TRAINER_GENERATOR_URL"):
        host, _, port = url.removeprefix("http://").partition(":")
        wanted.add(host)
        if host not in services or (
            services[host]["environment"]["SYNTHREP_GENERATOR_PORT"] != port
        ):
            yield f"{name}: nothing answers at {url}"
    for other in sorted(wanted & services.keys()):
        if service["networks"].keys().isdisjoint(services[other]["networks"]):
            yield f"{name} cannot reach {other}"
