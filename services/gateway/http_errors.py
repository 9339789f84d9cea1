"""Our errors as OpenAI's: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from dspark.errors import (
    DSparkError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)


class BodyTooLargeError(InvalidRequestError):
    """The body is over the limit."""

    code = "request_too_large"


# The first that fits: (error, status, OpenAI's type).
_KINDS: tuple[tuple[type[DSparkError], int, str], ...] = (
    (BodyTooLargeError, 413, "invalid_request_error"),
    (InvalidRequestError, 400, "invalid_request_error"),
    (UnauthenticatedError, 401, "invalid_request_error"),
    (ModelNotFoundError, 404, "invalid_request_error"),
    (OverloadedError, 429, "rate_limit_error"),
    (UnavailableError, 503, "service_unavailable_error"),
    (DSparkError, 500, "server_error"),
)


def error_body(error: Exception) -> dict[str, Any]:
    """What the client is told; of an unexpected error, nothing of its inside."""
    if not isinstance(error, DSparkError):
        return plain_error("the gateway failed; its log says why: report this", "server_error")
    _, _, kind = _kind(error)
    param = error.param if isinstance(error, InvalidRequestError) else None
    if isinstance(error, ModelNotFoundError):
        param = "model"
    return plain_error(str(error), kind, param=param, code=error.code)


def plain_error(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: DSparkError) -> JSONResponse:
    """The whole response to a request that failed before its headers."""
    _, status, _ = _kind(error)
    headers: dict[str, str] = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


def _kind(error: DSparkError) -> tuple[type[DSparkError], int, str]:
    return next(kind for kind in _KINDS if isinstance(error, kind[0]))
