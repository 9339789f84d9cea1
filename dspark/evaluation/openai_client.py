"""One streamed chat completion of any OpenAI-compatible server, timed event by event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from dspark.errors import ConfigError, UnavailableError
from dspark.evaluation.latency import RequestRecord
from dspark.evaluation.traffic import Ask

# Servers that take `ignore_eos`, by what they call themselves in `owned_by` of their models. Others
# refuse an unknown field, or say nothing and stop at the end of the answer all the same.
TAKE_IGNORE_EOS = frozenset({"vllm", "sglang", "llamacpp"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, or one way of asking it."""

    name: str
    url: str  # up to and with /v1
    model: str = ""
    owner: str = ""  # `owned_by` of the model
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every request's body

    def body(self, ask: Ask) -> dict[str, Any]:
        """What is posted."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": ask.prompt}],
            "max_tokens": ask.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }


def parse_endpoint(option: str, text: str) -> Endpoint:
    """NAME=URL; ConfigError names `option`."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{option} wants NAME=URL, such as ours=http://127.0.0.1:8000/v1; got {text!r}"
        )
    return Endpoint(name, url.rstrip("/"))


async def discover(http: httpx.AsyncClient, endpoint: Endpoint) -> Endpoint:
    """The same with the first model that it serves. UnavailableError if it does not tell."""
    url = f"{endpoint.url}/models"
    try:
        answer = await http.get(url, timeout=30)
        answer.raise_for_status()
        first = answer.json()["data"][0]
        return replace(endpoint, model=first["id"], owner=first.get("owned_by", ""))
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise UnavailableError(
            f"{endpoint.name}: {url} lists no model ({type(error).__name__}: {error}): is the "
            "server up, and does the URL end in /v1?"
        ) from error


async def try_out(http: httpx.AsyncClient, endpoint: Endpoint, ask: Ask) -> None:
    """One request outside any measurement. UnavailableError with the server's own words."""
    try:
        answer = await http.post(
            f"{endpoint.url}/chat/completions", json=endpoint.body(ask), timeout=300
        )
    except httpx.HTTPError as error:
        raise UnavailableError(f"{endpoint.name}: {type(error).__name__}: {error}") from error
    if answer.status_code != 200:
        raise UnavailableError(
            f"{endpoint.name} refuses a request with HTTP {answer.status_code}: {answer.text[:500]}"
        )


async def ask_streaming(
    http: httpx.AsyncClient, endpoint: Endpoint, ask: Ask, due_s: float, timeout_s: float
) -> RequestRecord:
    """Timed by perf_counter. What goes wrong with the server is a `failure`, never an error."""
    answer = _Answer()
    failure = ""
    try:
        async with (
            asyncio.timeout(timeout_s),
            http.stream(
                "POST", f"{endpoint.url}/chat/completions", json=endpoint.body(ask), timeout=None
            ) as response,
        ):
            if response.status_code != 200:
                raise _FailedError(f"HTTP {response.status_code}")
            async for now, data in _events(response):
                answer.take(now, data)
        answer.check()
    except _FailedError as error:
        failure = str(error)
    except TimeoutError:
        failure = "timeout"
    except (httpx.ConnectError, httpx.ConnectTimeout):
        failure = "no connection"
    except httpx.HTTPError:
        failure = "broken stream" if answer.event_s else "broken before text"
    return RequestRecord(
        due_s=due_s,
        event_s=tuple(answer.event_s),
        output_tokens=answer.usage.get("completion_tokens", len(answer.event_s)),
        prompt_tokens=answer.usage.get("prompt_tokens"),
        counted="completion_tokens" in answer.usage,
        failure=failure,
    )


class _FailedError(Exception):
    """Its text is the reason, in few words so that like failures count together."""


class _Answer:
    def __init__(self) -> None:
        self.event_s: list[float] = []
        self.usage: dict[str, Any] = {}
        self._finished = False

    def take(self, now_s: float, data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
            if error := event.get("error"):
                code = error.get("code") if isinstance(error, dict) else error
                raise _FailedError(f"error event {code}")
            # With some servers every event has the usage so far: the last one counts.
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if any(delta.get(key) for key in ("content", "reasoning_content", "reasoning")):
                    self.event_s.append(now_s)
                self._finished |= choice.get("finish_reason") is not None
        except (ValueError, AttributeError, TypeError) as error:
            raise _FailedError("malformed event") from error

    def check(self) -> None:
        """After a stream that closed in order."""
        if not self._finished:
            raise _FailedError("ended early")
        if not self.event_s:
            raise _FailedError("no text")


async def _events(response: httpx.Response) -> AsyncIterator[tuple[float, bytes]]:
    """(when it came, data). Lines end at LF alone: httpx's also end at U+2028, which text may hold.

    An event is one `data` line with all of these servers; comments and other fields are skipped.
    """
    rest = b""
    async for chunk in response.aiter_bytes():
        now = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line.removeprefix(b"data:").strip()
