"""Placing while the channel to the scheduler is closed under the call, by the lease keeper."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from helpers.fake_services import FakeScheduler, FakeVerifier

from dspark.errors import UnavailableError
from dspark.pb import scheduler_pb2 as sp
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.placement import Placement
from dspark.types import Request, SamplingParams

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=7))
KNOWN = sp.Replica(incarnation="known", address="127.0.0.1:1", model="m", max_context_tokens=9)


@pytest.fixture
async def scheduler() -> AsyncIterator[FakeScheduler]:
    scheduler = await FakeScheduler(FakeVerifier(lambda request: [], model="m")).start()
    scheduler.answer_places.clear()
    yield scheduler
    scheduler.answer_places.set()
    await scheduler.kill()


@pytest.fixture
async def channel(scheduler: FakeScheduler) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        yield channel


def placement(channel: Any, *verifiers: sp.Replica) -> Placement:
    cluster = ClusterView("m")
    cluster.heard(sp.HeartbeatResponse(verifiers=verifiers))
    return Placement(cluster, lambda: channel)


async def test_a_channel_closed_meanwhile_is_no_cancellation(
    scheduler: FakeScheduler, channel: Any
) -> None:
    placing = asyncio.create_task(placement(channel, KNOWN).place(REQUEST, "m", ()))
    await asyncio.wait_for(scheduler.placed.wait(), 10)
    await channel.close()
    assert (await placing).incarnation == "known"


async def test_a_closed_channel_counts_as_away(channel: Any) -> None:
    await channel.close()
    assert (await placement(channel, KNOWN).place(REQUEST, "m", ())).incarnation == "known"


async def test_a_cancellation_is_one(scheduler: FakeScheduler, channel: Any) -> None:
    placing = asyncio.create_task(placement(channel, KNOWN).place(REQUEST, "m", ()))
    await asyncio.wait_for(scheduler.placed.wait(), 10)
    placing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await placing


async def test_without_scheduler_the_avoided_come_last() -> None:
    other = sp.Replica(incarnation="other", model="m")
    of_another_model = sp.Replica(incarnation="stranger", model="x")
    away = placement(None, KNOWN, other, of_another_model)
    for _ in range(10):
        assert (await away.place(REQUEST, "m", ("known",))).incarnation == "other"
    both = ("known", "other")
    assert (await away.place(REQUEST, "m", both)).incarnation in both
    with pytest.raises(UnavailableError, match="no verifier is known"):
        await placement(None, of_another_model).place(REQUEST, "m", ())


async def test_without_scheduler_a_request_goes_where_it_fits() -> None:
    small = sp.Replica(incarnation="small", model="m", max_context_tokens=8)
    for verifiers in ((small, KNOWN), (KNOWN, small)):
        chosen = await placement(None, *verifiers).place(REQUEST, "m", ("known",))
        assert chosen.incarnation == "known"
    with pytest.raises(UnavailableError, match="9 positions"):
        await placement(None, small).place(REQUEST, "m", ())
