"""Who may call a server: looked at before a call reaches its handler."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health

from dspark.rpc.certificates import INTERNAL_NAME

log = logging.getLogger(__name__)

_OPEN = f"/{health.SERVICE_NAME}/"  # says whether we are well, and nothing else
_LOG_EVERY_S = 1.0  # a caller who is refused again and again shall not fill the log


class Refusal(NamedTuple):
    """Why a call is refused; the message goes to the caller and the log, so it holds no secret."""

    status: grpc.StatusCode
    message: str


Check = Callable[[grpc.aio.ServicerContext], Refusal | None]


def only_services(context: grpc.aio.ServicerContext) -> Refusal | None:
    """The peer's certificate must be a service's; one authority may have issued others as well."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    if INTERNAL_NAME.encode() in names:
        return None
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        f"the certificate shown does not carry the name {INTERNAL_NAME}",
    )


def not_by_file(context: grpc.aio.ServicerContext) -> Refusal | None:
    """A server's socket file is for health checks (rpc/server.py), past which nobody comes."""
    if not context.peer().startswith("unix:"):
        return None
    return Refusal(grpc.StatusCode.PERMISSION_DENIED, "this socket answers health checks only")


class RefusalLog:
    """Tells of refusals, of one a second and how many others there were."""

    def __init__(self) -> None:
        self._log_after, self._unlogged = 0.0, 0

    def note(self, what: str, who: str, why: str) -> None:
        """One more; none of the three may hold a secret."""
        now = time.monotonic()
        if now < self._log_after:
            self._unlogged += 1
            return
        log.warning(
            "refused %s to %s: %s (and %d before it that were not told)",
            what, who, why, self._unlogged,
        )  # fmt: skip
        self._log_after, self._unlogged = now + _LOG_EVERY_S, 0


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Refuses a call at the first check that does; the health service stays open to all."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._refusals = RefusalLog()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The method's own handler, behind the checks."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        return _replaced(handler, lambda inner: self._guarded(inner, method))

    def _guarded(self, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(inner):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                await self._admit(context, method)
                async with aclosing(inner(request, context)) as messages:
                    async for message in messages:
                        yield message

            return stream

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._admit(context, method)
            return await inner(request, context)

        return call

    async def _admit(self, context: grpc.aio.ServicerContext, method: str) -> None:
        for check in self._checks:
            refusal = check(context)
            if refusal is not None:
                self._refusals.note(method, context.peer(), refusal.message)
                await context.abort(*refusal)


def _replaced(
    handler: grpc.RpcMethodHandler, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> grpc.RpcMethodHandler:
    """The same handler with its function wrapped."""
    coders = handler.request_deserializer, handler.response_serializer
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(wrap(handler.stream_stream), *coders)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(wrap(handler.stream_unary), *coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(wrap(handler.unary_stream), *coders)
    return grpc.unary_unary_rpc_method_handler(wrap(handler.unary_unary), *coders)
