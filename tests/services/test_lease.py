"""A replica's lease ends in order, whatever becomes of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from dspark.errors import NotLeaderError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.lease import LeaseKeeper
from dspark.rpc.status import abort


class SilentWhenDraining(scheduler_pb2_grpc.SchedulerServicer):
    """Renews leases, but never answers a replica that leaves."""

    def __init__(self) -> None:
        self.leaving = asyncio.Event()

    async def Heartbeat(  # noqa: N802 - gRPC's name
        self, request: pb.HeartbeatRequest, context: object
    ) -> pb.HeartbeatResponse:
        if request.draining:
            self.leaving.set()
            await asyncio.Event().wait()
        return pb.HeartbeatResponse(lease_ms=60_000)


class StandsBy(scheduler_pb2_grpc.SchedulerServicer):
    """Sends everybody to `leader`, or takes them if that is empty."""

    def __init__(self, leader: str = "") -> None:
        self.leader, self.beats = leader, 0
        self.beaten = asyncio.Event()

    async def Heartbeat(  # noqa: N802 - gRPC's name
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> pb.HeartbeatResponse:
        self.beats += 1
        self.beaten.set()
        if self.leader:
            await abort(context, NotLeaderError(self.leader))
        return pb.HeartbeatResponse(lease_ms=60_000)


@asynccontextmanager
async def serving(scheduler: StandsBy) -> AsyncIterator[str]:
    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_the_leader_is_gone_to_at_once() -> None:
    leader, standby = StandsBy(), StandsBy()
    async with serving(leader) as address, serving(standby) as other:
        standby.leader = address

        async def locate() -> str:
            return other

        keeper = LeaseKeeper(pb.Replica(), locate, pb.Load, lambda beat: None, interval_s=60.0)
        keeper.start()
        await asyncio.wait_for(leader.beaten.wait(), 10)  # well within a heartbeat
        await keeper.stop()
    assert (standby.beats, leader.beats) == (1, 1)


async def test_schedulers_that_name_each_other_are_left_for_the_next_heartbeat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, other = StandsBy(), StandsBy()
    async with serving(one) as address, serving(other) as elsewhere:
        one.leader, other.leader = elsewhere, address
        located = 0
        again = asyncio.Event()

        async def locate() -> str:
            nonlocal located
            located += 1
            if located > 1:
                again.set()
                await asyncio.Event().wait()
            return address

        keeper = LeaseKeeper(pb.Replica(), locate, pb.Load, lambda beat: None, interval_s=1.0)
        keeper.start()
        await asyncio.wait_for(again.wait(), 10)
        assert keeper.channel is None
        await keeper.stop()
    assert (one.beats, other.beats) == (2, 1)
    assert "none leads yet" in caplog.text


async def test_a_channel_that_is_lost_while_draining_ends_nothing_else() -> None:
    scheduler = SilentWhenDraining()
    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def locate() -> str:
        return f"127.0.0.1:{port}"

    registered = asyncio.Event()
    keeper = LeaseKeeper(
        pb.Replica(), locate, pb.Load, lambda beat: registered.set(), interval_s=60.0
    )
    keeper.start()
    await registered.wait()
    assert keeper.channel is not None
    draining = asyncio.create_task(keeper.drain())
    await scheduler.leaving.wait()
    await keeper.channel.close()  # as a heartbeat that fails does
    await draining
    await keeper.stop()
    await server.stop(None)
