"""The driver against real HTTP servers: one that answers, and some that do not."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dspark.evaluation.openai_client import Endpoint, OpenAIClient, Record, closed_loop, open_loop
from dspark.evaluation.traffic import Uniform

WORDS = 6


def chunk(text: str = "", finish: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


class Server:
    """Answers in the manner that a request's model asks for; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.most, self.now = 0, 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.answer)

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if body["model"] == "full":
            return JSONResponse({"error": "too many"}, 429)
        return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for word in range(WORDS):
                await asyncio.sleep(0)
                yield chunk(f"word{word} ")
                if body["model"] == "breaking" and word == 2:
                    return
                if body["model"] == "failing" and word == 2:
                    yield f"data: {json.dumps({'error': {'message': 'lost'}})}\n\n"
                    return
            yield chunk(finish="length")
            if body["model"] != "terse":
                usage = {"completion_tokens": 2 * WORDS}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.now -= 1


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[str]:
    config = uvicorn.Config(server.app, port=0, log_level="error", lifespan="off")
    http = uvicorn.Server(config)
    socket = config.bind_socket()
    serving = asyncio.create_task(http.serve([socket]))
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
    finally:
        http.should_exit = True
        await serving
        socket.close()


async def ask(model: str, server: Server | None = None) -> Record:
    async with running(server or Server()) as url:
        endpoint = Endpoint("it", url, model, {"speculate": False})
        async with OpenAIClient(endpoint) as client:
            return await client.ask("hello", 12)


async def test_an_answer() -> None:
    server = Server()
    record = await ask("kind", server)
    assert record.failure == ""
    assert record.tokens == 2 * WORDS
    assert len(record.event_times) == WORDS
    assert record.sent_at < record.event_times[0] <= record.event_times[-1] == record.ended_at
    (asked,) = server.asked
    assert asked["max_tokens"] == 12
    assert asked["speculate"] is False
    assert asked["stream_options"] == {"include_usage": True}


async def test_a_server_that_does_not_count_is_counted_for() -> None:
    record = await ask("terse")
    assert (record.failure, record.tokens) == ("", WORDS)


async def test_what_goes_wrong_is_recorded() -> None:
    assert (await ask("full")).failure == "HTTP 429"
    assert (await ask("breaking")).failure == "broken off"
    assert (await ask("failing")).failure.startswith("error:")
    async with OpenAIClient(Endpoint("gone", "http://127.0.0.1:9/v1", "m")) as client:
        assert (await client.ask("hello", 4)).failure == "ConnectError"


async def test_loops() -> None:
    server, prompts = Server(), itertools.cycle(["a", "b"])
    async with running(server) as url, OpenAIClient(Endpoint("it", url, "kind")) as client:
        closed = await closed_loop(
            client, prompts, Uniform(3, 5), random.Random(0), users=3, duration_s=0.2
        )
        assert 1 <= server.most <= 3
        opened = await open_loop(
            client, prompts, Uniform(3, 5), random.Random(0), rate=200.0, duration_s=0.2
        )
    assert len(closed) + len(opened) == len(server.asked)
    assert {body["max_tokens"] for body in server.asked} <= {3, 4, 5}
    assert not any(record.failure for record in closed + opened)
    sent = [record.sent_at for record in sorted(opened, key=lambda record: record.sent_at)]
    assert sent[-1] - sent[0] <= 0.4
