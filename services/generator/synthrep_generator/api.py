"""The generator's REST service: takes prompts in, reports progress, hands out shards.

It writes intake files, pause markers and the log lines of cancellations and rejections; all else
it reads. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from synthrep_generator import (
    events,
    metrics,
    routes_batches,
    routes_datasets,
    routes_groups,
    routes_service,
    routes_uploads,
)
from synthrep_generator.admission import Admission
from synthrep_generator.backlog import Backlog, LiveWork
from synthrep_generator.catalog import Catalog
from synthrep_generator.context import Context, authorise
from synthrep_generator.problems import install_problem_handlers
from synthrep_generator.queues import WorkQueue
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.uploads import MAX_BYTES
from synthrep_shared.asgi import App, Guard, OwnNames, describe_keys
from synthrep_shared.logs import configure_logging
from synthrep_shared.messages import BatchRequest, Problem
from synthrep_shared.storage import prepare_root
from synthrep_shared.tracing import make_tracer

logger = logging.getLogger(__name__)
_VERSION = "0.1.0"
_GRACE_S = 5
_SWITCH_S = 0.001
_ROUTERS = (
    routes_uploads.router,  # before the batches: `upload` is no batch id
    routes_batches.router,
    routes_datasets.router,
    routes_groups.router,
    events.router,
    routes_service.router,
    metrics.router,
)


def create_app(settings: GeneratorSettings, backlog: Backlog | None = None) -> App:
    """The service as an ASGI app; makes or probes the root. `backlog` is Redis unless given."""
    prepare_root(settings.root)
    catalog = Catalog(settings.root, copy_bytes=settings.copy_bytes)
    live = LiveWork(WorkQueue(settings) if backlog is None else backlog)
    admission = Admission(settings, catalog, live, make_tracer("generator-api"))
    context = Context(settings=settings, catalog=catalog, live=live, admission=admission)
    app = FastAPI(
        title="SynthRep generator",
        version=_VERSION,
        summary="Text-to-image generation as a service: prompts in, sealed shards out",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(authorise)],
        lifespan=_lifespan,
    )
    registry = metrics.make_registry(context)
    app.state.context = context
    app.state.registry = registry
    app.state.uploads = routes_uploads.make_upload_limiter()
    app.state.listeners = events.make_listener_limiter()
    for router in _ROUTERS:
        app.include_router(router)
    app.state.api_routes = [route for router in _ROUTERS for route in router.routes]
    install_problem_handlers(app)
    has_keys = bool(settings.api_keys)
    app.openapi = cache(partial(_describe, app, has_keys=has_keys))  # type: ignore[method-assign]
    return Guard(
        metrics.RequestMetrics(app, registry),
        keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        large_paths={"/v1/batches/upload": MAX_BYTES},
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    catalog: Catalog = app.state.context.catalog
    # Long logs are read while the health checks answer already.
    threading.Thread(target=_first_look, args=(catalog,), name="first-look", daemon=True).start()
    yield


def _first_look(catalog: Catalog) -> None:
    """Read the logs once; a store that does not answer yet is the readiness check's to report."""
    with suppress(OSError):
        catalog.datasets()


def _describe(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of bodies that routes read themselves."""
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    _, extra = models_json_schema(
        [(BatchRequest, "validation"), (Problem, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    # The framework describes event streams with a keyword of a later OpenAPI than it declares.
    stream = schema["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]
    stream["text/event-stream"] = {"schema": {"type": "string"}}
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(extra["$defs"])
    describe_keys(schema, has_keys=has_keys)
    return schema


def main() -> None:
    """Serve until SIGTERM, then end with status 0."""
    # The server shuts down first and then raises the signal again for whoever had it before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = GeneratorSettings()
    configure_logging("generator-api", settings.log_level)
    logger.info("settings were read", extra={"settings": settings.model_dump(mode="json")})
    app = create_app(settings)
    # A thread that reads a log or an upload gives way to an answer after this, not after 5 ms.
    sys.setswitchinterval(_SWITCH_S)
    # What lives as long as the process is not looked at again: a full collection took 60 ms.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        OwnNames(app, keys=settings.api_keys, names=settings.allowed_hosts),
        host=settings.host,
        port=settings.port,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=_GRACE_S,
    )


if __name__ == "__main__":
    main()
