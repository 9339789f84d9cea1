"""Drives any OpenAI-compatible endpoint, and records when what came.

Nothing is left out: a request that is refused, broken off or late is recorded with its reason, and
counts against the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from dspark.evaluation.traffic import Lengths, poisson_arrivals

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, or one way of using it."""

    name: str
    url: str  # up to and with /v1
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of every request
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are of the monotonic clock, in seconds."""

    sent_at: float
    event_times: tuple[float, ...]  # when text came, an event of one or more tokens each
    tokens: int
    failure: str = ""  # empty: answered whole

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.event_times[0] - self.sent_at

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first; 0 where there is none."""
        return (self.event_times[-1] - self.event_times[0]) / max(1, self.tokens - 1)

    @property
    def ended_at(self) -> float:
        """When it was over."""
        return self.event_times[-1] if self.event_times else self.sent_at


class OpenAIClient:
    """One endpoint's connections."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._http = httpx.AsyncClient(
            base_url=endpoint.url, timeout=_TIMEOUT_S, headers=headers, limits=httpx.Limits()
        )

    async def __aenter__(self) -> OpenAIClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: str, max_tokens: int) -> Record:
        """One chat turn, greedy, streamed."""
        body = {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._endpoint.extra,
        }
        sent_at = time.monotonic()
        times: list[float] = []
        tokens, whole = 0, False
        try:
            async with self._http.stream("POST", "/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    return Record(sent_at, (), 0, f"HTTP {answer.status_code}")
                async for event in _events(answer):
                    if error := event.get("error"):
                        return Record(sent_at, tuple(times), len(times), f"error: {error}"[:200])
                    for choice in event.get("choices") or ():
                        if (choice.get("delta") or {}).get("content"):
                            times.append(time.monotonic())
                        whole = whole or bool(choice.get("finish_reason"))
                    if usage := event.get("usage"):
                        tokens = int(usage["completion_tokens"])
        except httpx.HTTPError as error:
            return Record(sent_at, tuple(times), len(times), type(error).__name__)
        failure = "" if whole and times else "no text" if whole else "broken off"
        return Record(sent_at, tuple(times), tokens or len(times), failure)


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(data)


async def closed_loop(
    client: OpenAIClient,
    prompts: Iterator[str],
    lengths: Lengths,
    rng: random.Random,
    *,
    users: int,
    duration_s: float,
) -> list[Record]:
    """So many users ask without a pause; what is under way at the end is finished."""
    records: list[Record] = []
    until = time.monotonic() + duration_s

    async def user() -> None:
        while time.monotonic() < until:
            records.append(await client.ask(next(prompts), lengths.draw(rng)))
            if records[-1].failure:
                await asyncio.sleep(0.05)  # a server that refuses at once is not to be flooded

    await asyncio.gather(*(user() for _ in range(users)))
    return records


async def open_loop(
    client: OpenAIClient,
    prompts: Iterator[str],
    lengths: Lengths,
    rng: random.Random,
    *,
    rate: float,  # requests a second
    duration_s: float,
) -> list[Record]:
    """Requests at the times of a Poisson process, however the server fares."""
    started = time.monotonic()
    tasks: list[asyncio.Task[Record]] = []
    for at_s in poisson_arrivals(rate, rng):
        if at_s > duration_s:
            break
        await asyncio.sleep(max(0.0, started + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(client.ask(next(prompts), lengths.draw(rng))))
    return list(await asyncio.gather(*tasks))
