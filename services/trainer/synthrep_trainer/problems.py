"""Every error of the API as problem details, and how its description says so.

A detail never repeats what the client sent.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from synthrep_shared.asgi import ProblemResponse, validation_problem
from synthrep_trainer.errors import IdempotencyConflictError

_log = logging.getLogger(__name__)
_RETRY_AFTER_S = 30


def not_found(what: str) -> HTTPException:
    """404 for a thing of this kind."""
    return HTTPException(404, f"there is no such {what}")


def too_many(what: str) -> HTTPException:
    """429: come back later."""
    return HTTPException(429, what, headers={"retry-after": str(_RETRY_AFTER_S)})


def install_problem_handlers(app: FastAPI) -> None:
    """Make every exception that leaves a route a problem."""
    app.add_exception_handler(StarletteHTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _schema_problem)
    app.add_exception_handler(ClientDisconnect, _gone_problem)
    app.add_exception_handler(IdempotencyConflictError, _conflict_problem)
    app.add_exception_handler(OSError, _storage_problem)
    app.add_exception_handler(ValidationError, _version_problem)
    app.add_exception_handler(Exception, _unexpected_problem)


async def _http_problem(_: Request, error: Exception) -> Any:
    assert isinstance(error, StarletteHTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = "" if error.detail == phrase else str(error.detail)
    return ProblemResponse(error.status_code, detail, headers=error.headers)


async def _schema_problem(_: Request, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError)
    return validation_problem([dict(entry) for entry in error.errors()])


async def _gone_problem(_: Request, __: Exception) -> Any:
    return ProblemResponse(400, "the body ended early")


async def _conflict_problem(_: Request, error: Exception) -> Any:
    return ProblemResponse(409, str(error))


async def _storage_problem(_: Request, error: Exception) -> Any:
    _log.error("storage_failed", exc_info=error)
    return ProblemResponse(503, "the storage does not answer", retry_after_s=_RETRY_AFTER_S)


async def _version_problem(_: Request, error: Exception) -> Any:
    _log.error("file_unreadable", exc_info=error)
    return ProblemResponse(503, "a file of it was written by another version of the service")


async def _unexpected_problem(_: Request, __: Exception) -> Any:
    # The framework raises it again behind this answer, and the server logs it.
    return ProblemResponse(500, "an unexpected error, see the service's log")
