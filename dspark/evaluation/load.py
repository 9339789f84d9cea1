"""Puts an endpoint under a load for one turn, and records every request."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from dspark.errors import ConfigError
from dspark.evaluation.latency import RequestRecord, Turn
from dspark.evaluation.openai_client import Endpoint, ask_streaming
from dspark.evaluation.traffic import Ask, ClosedLoop, Load, Poisson


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop asking, whichever comes first, and when to stop waiting."""

    duration_s: float = math.inf
    requests: float = math.inf
    warm_up_s: float = 0.0  # at the start, left out of the window
    timeout_s: float = 600.0  # of one request
    failure_pause_s: float = 1.0  # of a user who got no answer: a refusing server is not stormed


async def run_turn(
    http: httpx.AsyncClient,
    endpoint: Endpoint,
    load: Load,
    asks: Iterator[Ask],
    limits: Limits,
    seed: str = "",
) -> Turn:
    """Ask until the limits are reached, and wait for what is under way.

    The window begins after the warm-up and ends when the load falls: at the end of the duration, or
    when a user finds nothing more to ask, or when the arrival after the last one would be due.
    ConfigError if that is before the warm-up is over.
    """
    turn = _Turn(http, endpoint, asks, limits)
    match load:
        case ClosedLoop():
            await turn.closed(load)
        case Poisson():
            await turn.open(load, random.Random(seed))
    start_s = turn.begin_s + limits.warm_up_s
    if turn.end_s <= start_s:
        raise ConfigError(
            f"{endpoint.name} at {load}: asking ended after {turn.end_s - turn.begin_s:.2f} s, "
            f"within the warm-up of {limits.warm_up_s:g} s: ask for longer, or shorten it"
        )
    return Turn(tuple(turn.records), start_s, turn.end_s)


class _Turn:
    def __init__(
        self, http: httpx.AsyncClient, endpoint: Endpoint, asks: Iterator[Ask], limits: Limits
    ) -> None:
        self.records: list[RequestRecord] = []
        self.begin_s = time.perf_counter()
        self.end_s = self.begin_s + limits.duration_s
        self._http, self._endpoint, self._asks, self._limits = http, endpoint, asks, limits
        self._left = limits.requests

    async def closed(self, load: ClosedLoop) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(load.users):
                group.create_task(self._user())

    async def open(self, load: Poisson, rng: random.Random) -> None:
        due_s = self.begin_s
        async with asyncio.TaskGroup() as group:
            for gap_s in load.gaps_s(rng):
                due_s += gap_s
                if due_s >= self.end_s or not self._left:
                    self.end_s = min(self.end_s, due_s)
                    break
                self._left -= 1
                await asyncio.sleep(due_s - time.perf_counter())
                group.create_task(self._send(due_s))

    async def _user(self) -> None:
        while (now := time.perf_counter()) < self.end_s and self._left:
            self._left -= 1
            if (await self._send(now)).failure:
                left_s = self.end_s - time.perf_counter()
                await asyncio.sleep(min(self._limits.failure_pause_s, left_s))
        self.end_s = min(self.end_s, now)

    async def _send(self, due_s: float) -> RequestRecord:
        record = await ask_streaming(
            self._http, self._endpoint, next(self._asks), due_s, self._limits.timeout_s
        )
        self.records.append(record)
        return record
