"""The trainer's REST service: takes run and probe requests in, reports how they stand.

It writes request files and what is wanted of them; all else it reads. A launcher does the work.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from synthrep_shared.asgi import App, Guard, OwnNames, describe_keys
from synthrep_shared.logs import configure_logging
from synthrep_shared.messages import ProbeRequest, ProbeSetRequest, Problem, RunRequest
from synthrep_trainer import (
    routes_comparisons,
    routes_probe_sets,
    routes_probes,
    routes_runs,
    routes_service,
)
from synthrep_trainer.context import Context, authorise
from synthrep_trainer.page import actions
from synthrep_trainer.page import routes as page
from synthrep_trainer.page.door import Door
from synthrep_trainer.page.generator import Generator
from synthrep_trainer.page.refusals import HtmlProblems
from synthrep_trainer.problems import install_problem_handlers
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
_VERSION = "0.1.0"
_GRACE_S = 5
_ROUTERS = (
    routes_runs.router,
    routes_probes.router,
    routes_probe_sets.router,
    routes_comparisons.router,
    routes_service.router,
    page.router,
    actions.router,
)


def create_app(
    settings: TrainerSettings,
    *,
    generator: httpx.BaseTransport | None = None,
    is_ending: Callable[[], bool] = bool,
) -> App:
    """The service as an ASGI app; makes the folder of runs.

    `generator` carries what the page asks the generator; None: the network. Streams end once
    `is_ending`.
    """
    place = Workplace(settings.runs)
    place.make_folders()
    context = Context(settings, place, is_ending)
    app = FastAPI(
        title="SynthRep trainer",
        version=_VERSION,
        summary="Contrastive training on shards while they are being made, and linear probes",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(authorise)],
        lifespan=_lifespan,
    )
    app.state.context = context
    app.state.generator = Generator(settings, generator)
    app.state.registry = routes_service.make_registry(context)
    app.state.viewers = page.make_viewer_limiter(app.state.registry)
    app.state.listeners = routes_runs.make_listener_limiter()
    app.state.probe_uploads = routes_probe_sets.make_upload_limiter()
    for router in _ROUTERS:
        app.include_router(router)
    install_problem_handlers(app)
    describe = functools.cache(functools.partial(_describe, app, has_keys=bool(settings.api_keys)))
    app.openapi = describe  # type: ignore[method-assign]
    guard = Guard(
        app,
        keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        large_paths={"/v1/probe-datasets": settings.probe_upload_bytes} | actions.LARGE_PATHS,
        open_paths=page.OPEN_PATHS,
    )
    return Door(HtmlProblems(guard))


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.generator.close()


def _describe(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of bodies that routes read themselves."""
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    _, extra = models_json_schema(
        [
            (RunRequest, "validation"),
            (ProbeRequest, "validation"),
            (ProbeSetRequest, "validation"),
            (Problem, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(extra["$defs"])
    describe_keys(schema, has_keys=has_keys)
    return schema


def make_server(settings: TrainerSettings) -> uvicorn.Server:
    """The service at its address; its streams end when it is told to."""
    app = create_app(settings, is_ending=lambda: server.should_exit)
    server = uvicorn.Server(
        uvicorn.Config(
            OwnNames(app, keys=settings.api_keys, names=settings.allowed_hosts),
            host=settings.host,
            port=settings.port,
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    return server


def main() -> None:
    """Serve until SIGTERM, then end with status 0."""
    # The server shuts down first and then raises the signal again for whoever had it before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = TrainerSettings()
    configure_logging("trainer-api", settings.log_level)
    _log.info("settings_read", extra={"settings": settings.model_dump(mode="json")})
    server = make_server(settings)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    sys.exit(not server.started)


if __name__ == "__main__":
    main()
