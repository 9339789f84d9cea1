"""API keys before the HTTP routes: what is not open needs one, whether it exists or not."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from dspark.errors import UnauthenticatedError
from dspark.rpc.guard import RefusalLog
from dspark.services.gateway.api_keys import ApiKeys
from dspark.services.gateway.http_errors import error_response

OPEN_PATH = "/health"  # for probes; it says no text


class KeyMiddleware:
    """Answers 401 before a body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys
        self._refusals = RefusalLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _route(scope) != OPEN_PATH:
            connection = HTTPConnection(scope)
            try:
                self._keys.client_of(connection.headers.getlist("authorization"))
            except UnauthenticatedError as error:
                who = connection.client.host if connection.client else "a client"
                self._refusals.note(f"{scope['method']} {scope['path']!r:.80}", who, str(error))
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _route(scope: Scope) -> str:
    """The path within the application: Serve puts its route prefix before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
