"""API keys before the HTTP routes: what is not open needs one, whether it exists or not."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from dspark.errors import UnauthenticatedError
from dspark.rpc.guard import RefusalLog
from dspark.services.gateway.api_keys import ApiKeys
from dspark.services.gateway.http_errors import error_response

OPEN_PATHS = frozenset({"/health", "/metrics"})  # for probes and scrapers; they say no text


class KeyMiddleware:
    """Answers 401 before a body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys
        self._refusals = RefusalLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            connection = HTTPConnection(scope)
            try:
                self._keys.client_of(connection.headers.getlist("authorization"))
            except UnauthenticatedError as error:
                who = connection.client.host if connection.client else "a client"
                self._refusals.note(f"{scope['method']} {scope['path']!r:.80}", who, str(error))
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
