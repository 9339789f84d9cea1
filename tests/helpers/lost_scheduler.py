"""A leader that can be out of reach and lead on, for all it knows; it says everything twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from dspark.config import ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.scheduling.cluster import Cluster
from dspark.services.scheduler.leadership import Leadership, StoreElection
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.store import open_store

_BOUND_S = 60.0


class Twice:
    """Of a call, all that is written, two times."""

    def __init__(self, context: Any, wrote: Callable[[], None]) -> None:
        self._context, self._wrote = context, wrote

    async def write(self, message: pb.StepPlan) -> None:
        for _ in range(2):
            await self._context.write(message)
        self._wrote()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class StutteringScheduler(SchedulerServicer):
    """Sends every plan twice."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.plans = 0
        self.wrote = asyncio.Event()

    async def Coordinate(self, request_iterator: Any, context: Any) -> None:  # noqa: N802 - the contract's
        await super().Coordinate(request_iterator, Twice(context, self._count))

    def _count(self) -> None:
        self.plans += 1
        self.wrote.set()

    async def plans_more(self, count: int) -> None:
        """Wait until it has sent so many."""
        until = self.plans + count
        async with asyncio.timeout(_BOUND_S):
            while self.plans < until:
                self.wrote.clear()
                await self.wrote.wait()


class LostScheduler:
    """In this process, over a store of its own choice."""

    def __init__(self, config: ServeConfig) -> None:
        self._store = open_store(config.scheduler.store_url)
        election, lease_s = StoreElection(self._store), config.scheduler.leader_lease_s
        self._leadership = Leadership(election, lease_s, sole=True)
        cluster = Cluster(config.scheduler.lease_s, asyncio.get_running_loop().time)
        self.servicer = StutteringScheduler(config, cluster, self._store, self._leadership)
        self._server = ReplicaServer()
        self._port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        await self.appear()
        await self._leadership.start(self.address, self.servicer.take_over)

    async def vanish(self) -> None:
        """Nobody reaches it; it stands for election still."""
        await self._server.stop(0)

    async def appear(self) -> None:
        """Where it was before."""
        self._server = ReplicaServer()
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(self.servicer, self._server.server)
        names = pb.DESCRIPTOR.services_by_name
        self._port = await self._server.start("127.0.0.1", self._port, [names["Scheduler"]])

    async def stop(self) -> None:
        await self.vanish()
        await self._leadership.stop()
        await self._store.close()
