"""Server-sent events that stop when the client hangs up, whatever the server tells."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """One event."""
    # In ASCII: U+2028 and the like end a line for some clients that read by lines.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class SseResponse(StreamingResponse):
    """Streams events made from `source`, and closes both in every case."""

    def __init__(
        self, events: AsyncGenerator[str, None], source: AsyncGenerator[Any, None]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies: do not hold
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Servers of ASGI 2.4 only raise on the next send, which is late for a generation that
        # is waiting; claiming 2.3 makes Starlette listen for the disconnect.
        heeding = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            await super().__call__(heeding, receive, _until_lost(send))
        finally:
            await self._events.aclose()
            await self._source.aclose()  # events that never began have not closed it


def _until_lost(send: Send) -> Send:
    async def forward(message: Message) -> None:
        try:
            await send(message)
        except OSError:  # gone: the disconnect arrives by `receive`
            return

    return forward
