"""Reading a request, within limits, and noticing that its client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from dspark.errors import InvalidRequestError
from dspark.rpc.options import MAX_PUBLIC_MESSAGE_BYTES
from dspark.services.gateway.http_errors import BodyTooLargeError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class ClientGoneError(Exception):
    """Nobody waits for the response any more."""


async def read_model(request: Request, model: type[M]) -> M:
    """The body as `model`.

    BodyTooLargeError, InvalidRequestError naming the field, ClientGoneError if not all of it came.
    """
    body = await _read(request)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid UTF-8 at byte {error.start}; send JSON in UTF-8"
        ) from error
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0], model) from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; when the client hangs up first, cancels it and raises ClientGoneError."""
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((working, hanging_up), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        hanging_up.cancel()
        # Wait: the caller is about to close what the work was using.
        await asyncio.gather(working, hanging_up, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and len(announced) < 20:
        _check_size(int(announced))
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            _check_size(len(body))
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return bytes(body)


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_PUBLIC_MESSAGE_BYTES:
        raise BodyTooLargeError(
            f"the body is over the limit of {MAX_PUBLIC_MESSAGE_BYTES} bytes: send a shorter prompt"
        )


def _invalid(detail: ErrorDetails, model: type[BaseModel]) -> InvalidRequestError:
    """pydantic's first complaint, in our words."""
    field = _path(detail["loc"])
    match detail["type"]:
        case "json_invalid":
            problem = detail["msg"]
            if "hex escape" in problem or "surrogate" in problem:
                problem += " (half a surrogate pair is not a character)"
            return InvalidRequestError(f"the body is not valid JSON: {problem}")
        case "extra_forbidden":
            known = ""
            if len(detail["loc"]) == 1:
                known = f"; supported are {', '.join(sorted(model.model_fields))}"
            message = f"{field} is unknown or not supported: leave it out{known}"
        case "missing":
            message = f"{field} is missing: it is required"
        case "value_error":
            message = f"{field}: {detail['ctx']['error']}"
        case _:
            message = f"{field}: {detail['msg']}; got {_shown(detail['input'])}"
    return InvalidRequestError(message, param=field or None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path or "the body"


def _shown(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
