"""A scheduler that leads by the real clock and knows its cluster by a given one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from dspark.config import ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.scheduling.cluster import Cluster
from dspark.services.scheduler.leadership import Leadership, StoreElection
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.store import MemoryStore, Store


@asynccontextmanager
async def led_scheduler(
    store: Store | None = None, clock: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[tuple[scheduler_pb2_grpc.SchedulerStub, str, SchedulerServicer]]:
    """Its stub, its address, and itself."""
    store = store or MemoryStore()
    leadership = Leadership(StoreElection(store), 60.0, sole=True)
    servicer = SchedulerServicer(ServeConfig(), Cluster(5.0, clock), store, leadership)
    server = ReplicaServer()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.server)
    port = await server.start("127.0.0.1", 0, [pb.DESCRIPTOR.services_by_name["Scheduler"]])
    address = f"127.0.0.1:{port}"
    await leadership.start(address, servicer.take_over)
    async with grpc.aio.insecure_channel(address) as channel:
        yield scheduler_pb2_grpc.SchedulerStub(channel), address, servicer
    await server.stop(0)
    await leadership.stop()
