"""Verifiers leave under load: their work moves, without an error or a token lost or repeated."""

from __future__ import annotations

import asyncio
import threading

import pytest
from helpers.live_cluster import live_cluster
from helpers.tiny import run, tiny_drafter, tiny_engine, tiny_target

from dspark.engine.verifier import VerifierEngine
from dspark.types import Request, SamplingParams

LONG = 400


def engine(**settings: int) -> VerifierEngine:
    target = tiny_target()  # each has its own: threads do not share a model
    return tiny_engine(target, tiny_drafter(target), **{"max_requests": 2, **settings})


def request(name: str, max_tokens: int = LONG) -> Request:
    return Request(
        name, (3, 1, 4, len(name)), SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )


async def test_who_waits_moves_at_once_and_who_runs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, going = engine(max_requests=1), threading.Event()
    going.set()
    step = slow.step
    monkeypatch.setattr(slow, "step", lambda: step() if going.wait(0.001) else [])
    async with live_cluster() as cluster, asyncio.TaskGroup() as group:
        first = await cluster.join(slow)
        runs = group.create_task(cluster.generate(request("runs")))
        await first.until(1, 0)
        going.clear()
        waits = group.create_task(cluster.generate(request("waits", 20)))
        await first.until(1, 1)
        second = await cluster.join(engine())
        leaving = group.create_task(first.leave(grace_s=60.0))
        got = await waits
        assert not runs.done()
        going.set()
        want = run(engine(), [request("waits", 20), request("runs")]).tokens
        assert (got, await runs) == (want["waits"], want["runs"])
        await leaving
        await second.leave(0)


async def test_streams_that_outlive_the_drain_go_on_elsewhere() -> None:
    async with live_cluster() as cluster, asyncio.TaskGroup() as group:
        first = await cluster.join(engine())
        streams = [group.create_task(cluster.generate(request(name))) for name in ("a", "bb")]
        await first.until(2, 0)
        second = await cluster.join(engine())
        await first.leave(grace_s=0.0)
        want = run(engine(), [request("a"), request("bb")]).tokens
        assert [await stream for stream in streams] == [want["a"], want["bb"]]
        await second.leave(0)


async def test_a_rolling_restart_under_load_costs_nothing() -> None:
    requests = [request("x" * (i + 1), 40 + 10 * i) for i in range(10)]
    want = run(engine(), requests).tokens
    async with live_cluster() as cluster, asyncio.TaskGroup() as group:
        verifiers = [await cluster.join(engine()) for _ in range(2)]
        streams = [group.create_task(cluster.generate(one)) for one in requests]
        for leaver in list(verifiers):
            await leaver.stepping()
            joining = group.create_task(cluster.join(engine()))
            await leaver.leave(grace_s=0.05)
            verifiers.append(await joining)
        assert [await stream for stream in streams] == [want[one.id] for one in requests]
        for verifier in verifiers[2:]:
            await verifier.leave(0)


async def test_moved_requests_wait_out_a_full_verifier() -> None:
    """They were let in once: what is left of the cluster takes them when it can."""
    async with live_cluster() as cluster, asyncio.TaskGroup() as group:
        first = await cluster.join(engine(max_requests=1))
        requests = [request("x" * (i + 1), 60) for i in range(6)]
        streams = [group.create_task(cluster.generate(one)) for one in requests]
        await first.until(1, 5)
        second = await cluster.join(engine(max_requests=1, max_waiting=1))
        await first.leave(grace_s=0.0)
        want = run(engine(), requests).tokens
        assert [await stream for stream in streams] == [want[one.id] for one in requests]
        await second.leave(0)
