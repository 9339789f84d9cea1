"""A replica's lease ends in order, whatever becomes of the scheduler."""

from __future__ import annotations

import asyncio

import grpc

from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.lease import LeaseKeeper


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
