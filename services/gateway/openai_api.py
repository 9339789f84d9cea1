"""The OpenAI-compatible HTTP API, over the generator. Needs no Ray."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dspark.errors import DSparkError
from dspark.services.gateway.api_keys import ApiKeys
from dspark.services.gateway.generation import Generator, Part
from dspark.services.gateway.http_body import ClientGoneError, read_model, unless_gone
from dspark.services.gateway.http_errors import error_body, error_response, plain_error
from dspark.services.gateway.http_keys import KeyMiddleware
from dspark.services.gateway.openai_replies import ChatReplies, CompletionReplies, Replies
from dspark.services.gateway.openai_schemas import ChatCompletionRequest, CompletionRequest
from dspark.services.gateway.request import GenerationRequest
from dspark.services.gateway.sse import DONE, SseResponse, event

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499  # nginx's number, for logs; nobody is there to read it


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests can be served, and what is amiss."""

    ok: bool
    reason: str = ""


def create_app(
    generator: Generator, health: Callable[[], Health], keys: ApiKeys | None = None
) -> FastAPI:
    """The ASGI application; without `keys` it asks for none."""
    # Bodies are read here, bounded and with our errors, so a generated schema would be empty.
    app = FastAPI(openapi_url=None)
    if keys is not None:
        app.add_middleware(KeyMiddleware, keys=keys)
    app.add_exception_handler(DSparkError, _dspark_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_model(request, ChatCompletionRequest)
        replies = ChatReplies(body.model, body.include_usage)
        return await respond(request, body, replies)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_model(request, CompletionRequest)
        replies = CompletionReplies(body.model, body.include_usage)
        return await respond(request, body, replies)

    async def respond(
        request: Request, body: ChatCompletionRequest | CompletionRequest, replies: Replies
    ) -> Response:
        asked: GenerationRequest = body.generation_request()
        parts = generator.generate(asked)
        if not body.stream:
            return JSONResponse(replies.whole(await unless_gone(request, _all(parts))))
        try:
            # Before the headers, so that what fails at once has a status of its own.
            first = await unless_gone(request, anext(parts))
        except BaseException:
            await parts.aclose()
            raise
        return SseResponse(_events(first, parts, replies, body.include_usage), parts)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [the_model()]}

    @app.get("/v1/models/{name:path}")  # names of Hugging Face hold a slash
    async def model(name: str) -> dict[str, Any]:
        generator.check_model(name)
        return the_model()

    def the_model() -> dict[str, Any]:
        return {
            "id": generator.model,
            "object": "model",
            "created": 0,
            "owned_by": "dspark",
            "max_model_len": generator.cluster.context_tokens or None,  # as vLLM names it
        }

    @app.get("/health")
    async def healthy() -> Response:
        now = health()
        told = {"status": "ok" if now.ok else "unavailable"}
        if now.reason:
            told["reason"] = now.reason
        return JSONResponse(told, 200 if now.ok else 503)

    return app


async def _all(parts: AsyncGenerator[Part, None]) -> list[Part]:
    async with aclosing(parts):
        return [part async for part in parts]


async def _events(
    first: Part, rest: AsyncGenerator[Part, None], replies: Replies, include_usage: bool
) -> AsyncGenerator[str, None]:
    try:
        for chunk in replies.opening(first):
            yield event(chunk)
        part = first
        while True:
            if part.text:
                yield event(replies.chunk(part, part.text, None))
            if part.finish is not None:
                break
            part = await anext(rest)
        yield event(replies.chunk(part, None, part.finish.reason.value))
        if include_usage:
            yield event(replies.usage_chunk(part, part.finish))
        yield DONE
    except Exception as error:
        # The status is out: tell it as an event, and leave out [DONE].
        if not isinstance(error, DSparkError):
            log.exception("a stream failed unexpectedly")
        yield event(error_body(error))


async def _dspark_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DSparkError)
    return error_response(error)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = plain_error(message, "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed unexpectedly", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(error), 500)
