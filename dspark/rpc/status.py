"""Our errors as gRPC statuses, and back. The stable code travels in trailing metadata."""

from __future__ import annotations

from typing import NoReturn

import grpc

from dspark.errors import (
    DSparkError,
    InvalidRequestError,
    ModelNotFoundError,
    NotLeaderError,
    OverloadedError,
    ProtocolError,
    QueueTimeoutError,
    UnavailableError,
)
from dspark.scheduling.pace import LEAST_WAIT_S, bounded_wait_s

_STATUS: dict[type[DSparkError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QueueTimeoutError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    NotLeaderError: grpc.StatusCode.UNAVAILABLE,
    ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
}
_CODE = "dspark-code"
_PARAM = "dspark-param"
_RETRY_AFTER = "dspark-retry-after-s"
_LEADER = "dspark-leader"  # of a scheduler that stands by; empty: it knows of none
# Of a message. It travels in a header, where a character takes up to 12 bytes; a peer that gets
# more than 8 KiB of headers sees RESOURCE_EXHAUSTED instead.
_MOST_CHARS = 512


async def abort(context: grpc.aio.ServicerContext, error: DSparkError) -> NoReturn:
    """End the call with the status that `error` stands for."""
    status = _STATUS.get(type(error), grpc.StatusCode.INTERNAL)
    trailing = [(_CODE, error.code)]
    if isinstance(error, InvalidRequestError) and error.param:
        trailing.append((_PARAM, error.param))
    if isinstance(error, OverloadedError):
        trailing.append((_RETRY_AFTER, f"{error.retry_after_s:g}"))
    if isinstance(error, NotLeaderError):
        trailing.append((_LEADER, error.leader))
    await context.abort(status, _cut(str(error)), tuple(trailing))
    raise AssertionError("abort raises")  # pragma: no cover


def from_rpc_error(error: grpc.aio.AioRpcError) -> DSparkError:
    """The error that a peer's status stands for; what we do not know means it is unavailable."""
    message = error.details() or error.code().name
    trailing = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequestError(message, param=trailing.get(_PARAM))
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return ModelNotFoundError(message)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = (
            QueueTimeoutError if trailing.get(_CODE) == QueueTimeoutError.code else OverloadedError
        )
        return kind(message, retry_after_s=_retry_after_s(trailing.get(_RETRY_AFTER, "")))
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return ProtocolError(message)
    if _LEADER in trailing:
        return NotLeaderError(trailing[_LEADER])
    return UnavailableError(message)


def _cut(message: str) -> str:
    """What fits into a status of a message that may repeat what a client sent."""
    return message if len(message) <= _MOST_CHARS else message[: _MOST_CHARS - 1] + "…"


def _retry_after_s(text: str) -> float:
    """A retry time that anybody may have written."""
    try:
        return bounded_wait_s(float(text))
    except ValueError:
        return LEAST_WAIT_S
