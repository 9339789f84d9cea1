"""Event streams end when the client hangs up, whatever the server promises to tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dspark.services.gateway.sse import SseResponse, event


class Client:
    """Hangs up at `gone`."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.started = asyncio.Event()
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)  # as a real one does: here a cancellation can strike
        if self.gone.is_set():
            raise OSError("the client is gone")
        self.body += message.get("body", b"")
        if self.body:
            self.started.set()


def test_an_event_is_two_lines_however_a_client_ends_lines() -> None:
    text = "".join(map(chr, range(0x3000))) + "🎉"
    data = event({"text": text})
    assert data.splitlines() == [data.removesuffix("\n\n"), ""]
    assert json.loads(data.removeprefix("data: ")) == {"text": text}


@pytest.mark.parametrize("spec_version", ["2.0", "2.3", "2.4"])
@pytest.mark.parametrize("before_it_began", [True, False])
async def test_hanging_up_closes_the_source(spec_version: str, before_it_began: bool) -> None:
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[str, None]:
        try:
            yield "first"
            yield "second"
            await asyncio.Event().wait()
        finally:
            closed.set()

    parts = source()
    first = await anext(parts)

    async def events() -> AsyncGenerator[str, None]:
        yield event({"part": first})
        async for part in parts:
            yield event({"part": part})

    client = Client()
    scope = {"type": "http", "asgi": {"spec_version": spec_version}}
    if before_it_began:
        client.gone.set()
    serving = asyncio.create_task(SseResponse(events(), parts)(scope, client.receive, client.send))
    if not before_it_began:
        await asyncio.wait_for(client.started.wait(), 10)
        client.gone.set()
    await asyncio.wait_for(serving, 10)
    assert closed.is_set()
