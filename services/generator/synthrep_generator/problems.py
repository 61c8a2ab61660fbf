"""Every error of the API as problem details.

The one place that knows which exception is which HTTP status. A detail never repeats what the
client sent.
"""

from __future__ import annotations

import errno
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from synthrep_generator.errors import (
    BacklogUnknownError,
    DatasetDeniedError,
    DiskReserveError,
    HighWaterError,
    IdempotencyConflictError,
    JudgeMissingError,
    ModelConfigError,
    UnknownModelError,
    UploadError,
    UploadTooLargeError,
)
from synthrep_shared.asgi import ProblemResponse, validation_problem
from synthrep_shared.errors import CommitLogError

logger = logging.getLogger(__name__)
RETRY_AFTER_S = 30
_SOON_S = 2
_STATUS: dict[type[Exception], tuple[int, int | None]] = {
    UnknownModelError: (422, None),
    JudgeMissingError: (422, None),
    ModelConfigError: (422, None),
    UploadError: (422, None),
    UploadTooLargeError: (413, None),
    IdempotencyConflictError: (409, None),
    DatasetDeniedError: (403, None),
    HighWaterError: (429, RETRY_AFTER_S),
    DiskReserveError: (507, RETRY_AFTER_S),
    BacklogUnknownError: (503, _SOON_S),
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def not_found(what: str) -> HTTPException:
    """404 for a thing of this kind."""
    return HTTPException(404, f"there is no such {what}")


def install_problem_handlers(app: FastAPI) -> None:
    """Make every exception that leaves a route a problem."""
    app.add_exception_handler(StarletteHTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _schema_problem)
    app.add_exception_handler(ClientDisconnect, _gone_problem)
    app.add_exception_handler(OSError, _storage_problem)
    app.add_exception_handler(CommitLogError, _log_problem)
    app.add_exception_handler(Exception, _unexpected_problem)
    for kind in _STATUS:
        app.add_exception_handler(kind, _known_problem)


async def _http_problem(request: Request, error: Exception) -> Any:
    assert isinstance(error, StarletteHTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["allow"] = ", ".join(_allowed_methods(request))
    phrase = HTTPStatus(error.status_code).phrase
    detail = "" if error.detail == phrase else str(error.detail)
    return ProblemResponse(error.status_code, detail, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes of the path; the framework itself names those of the first."""
    routes: list[APIRoute] = request.app.state.api_routes
    path = request.scope["path"]
    literal = [route for route in routes if route.path == path]
    matching = literal or [route for route in routes if route.path_regex.match(path)]
    return sorted({method for route in matching for method in route.methods or ()})


async def _schema_problem(_: Request, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError)
    return validation_problem([dict(entry) for entry in error.errors()])


async def _gone_problem(_: Request, __: Exception) -> Any:
    return ProblemResponse(400, "the body ended early")


async def _known_problem(_: Request, error: Exception) -> Any:
    status, retry_after_s = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
    retry_after_s = getattr(error, "retry_after_s", None) or retry_after_s
    return ProblemResponse(status, str(error), retry_after_s=retry_after_s)


async def _storage_problem(_: Request, error: Exception) -> Any:
    assert isinstance(error, OSError)
    logger.error("storage failed", exc_info=error)
    if error.errno in _FULL:
        return ProblemResponse(507, "the disk is full", retry_after_s=RETRY_AFTER_S)
    return ProblemResponse(503, "the storage does not answer", retry_after_s=RETRY_AFTER_S)


async def _log_problem(_: Request, error: Exception) -> Any:
    logger.error("commit log cannot be read on", exc_info=error)
    detail = "the commit log of this data set cannot be read; others are served"
    return ProblemResponse(503, detail, retry_after_s=RETRY_AFTER_S)


async def _unexpected_problem(_: Request, __: Exception) -> Any:
    # The framework raises it again behind this answer, and the server logs it.
    return ProblemResponse(500, "an unexpected error, see the service's log")
