"""Verifiers, a scheduler and a router as they run, in one process: real servers, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

from dspark.config import NetworkConfig, ServeConfig
from dspark.engine.runner import EngineRunner
from dspark.engine.verifier import VerifierEngine
from dspark.pb import scheduler_pb2 as sp
from dspark.pb import verifier_pb2, verifier_pb2_grpc
from dspark.rpc.lease import LeaseKeeper
from dspark.rpc.server import ReplicaServer
from dspark.rpc.transport import PLAINTEXT, Transport, open_transport
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.placement import Placement
from dspark.services.gateway.router import Router
from dspark.services.scheduler.service import SchedulerService
from dspark.services.verifier.coordination import load_to_pb
from dspark.services.verifier.servicer import VerifierServicer
from dspark.types import Request

MODEL = "m"
BEAT_S = 0.05
PATIENCE_S = 30.0  # until a test gives up; never the time that it takes


class LiveVerifier:
    """What a verifier replica runs, without its process."""

    def __init__(self, engine: VerifierEngine, transport: Transport = PLAINTEXT) -> None:
        self._transport = transport
        self.incarnation = f"verifier-{uuid4().hex[:8]}"
        self._loop, self._stepped = asyncio.get_running_loop(), asyncio.Event()
        self._server = ReplicaServer(certificates=transport.certificates)
        self.servicer = VerifierServicer(MODEL, self._loop)
        self.runner = EngineRunner(
            engine,
            on_results=self.servicer.deliver,
            on_refused=self.servicer.refuse,
            on_report=lambda report: self._loop.call_soon_threadsafe(self._stepped.set),
            on_failure=self.servicer.fail,
        )
        self.servicer.attach(self.runner)
        self._lease: LeaseKeeper | None = None

    async def start(self, scheduler: str) -> LiveVerifier:
        verifier_pb2_grpc.add_VerifierServicer_to_server(self.servicer, self._server.server)
        descriptor = verifier_pb2.DESCRIPTOR.services_by_name["Verifier"]
        port = await self._server.start("127.0.0.1", 0, [descriptor])
        self.runner.start()

        async def locate() -> str:
            return scheduler

        self._lease = LeaseKeeper(
            sp.Replica(
                role=sp.ROLE_VERIFIER,
                incarnation=self.incarnation,
                address=f"127.0.0.1:{port}",
                model=MODEL,
                max_context_tokens=512,
            ),
            locate,
            lambda: load_to_pb(self.runner),
            lambda answer: None,
            BEAT_S,
            transport=self._transport,
        )
        self._lease.start()
        return self

    async def until(self, running: int, waiting: int) -> None:
        """Wait for the engine to have so many requests; it must be stepping."""
        while self.runner.load[:2] != (running, waiting):
            await self.stepping()

    async def stepping(self) -> None:
        """Wait for a step."""
        self._stepped.clear()
        await asyncio.wait_for(self._stepped.wait(), PATIENCE_S)

    async def leave(self, grace_s: float) -> None:
        """As a replica does when it is stopped."""
        assert self._lease is not None
        await self._lease.drain()
        self.servicer.drain()
        await self._server.stop(grace_s)
        await self._lease.stop()
        await asyncio.to_thread(self.runner.stop)


class LiveCluster:
    """A scheduler's address, and a router to whatever verifiers there are."""

    def __init__(
        self,
        scheduler: str,
        view: ClusterView,
        router: Router,
        beaten: asyncio.Event,
        transport: Transport,
    ) -> None:
        self.scheduler, self._view, self._router = scheduler, view, router
        self._beaten, self._transport = beaten, transport

    async def join(self, engine: VerifierEngine) -> LiveVerifier:
        """A verifier more; returns once it is known."""
        verifier = await LiveVerifier(engine, self._transport).start(self.scheduler)
        while verifier.incarnation not in {v.incarnation for v in self._view.verifiers}:
            self._beaten.clear()
            await asyncio.wait_for(self._beaten.wait(), PATIENCE_S)
        return verifier

    async def generate(self, request: Request) -> list[int]:
        """All its tokens."""
        results = self._router.generate(request, MODEL)
        return [token async for result in results for token in result.token_ids]


@asynccontextmanager
async def live_cluster(network: NetworkConfig | None = None) -> AsyncIterator[LiveCluster]:
    """Without verifiers at first."""
    async with AsyncExitStack() as stack:
        network = network or NetworkConfig()
        transport = open_transport(network)
        scheduler = SchedulerService(ServeConfig(network=network))
        address = await scheduler.start("127.0.0.1")
        stack.push_async_callback(scheduler.stop, 0)
        view, beaten = ClusterView(MODEL), asyncio.Event()

        def heard(answer: sp.HeartbeatResponse) -> None:
            view.heard(answer)
            beaten.set()

        async def locate() -> str:
            return address

        keeper = LeaseKeeper(
            sp.Replica(role=sp.ROLE_GATEWAY, incarnation="gateway", address="127.0.0.1:1"),
            locate,
            sp.Load,
            heard,
            BEAT_S,
            transport=transport,
        )
        keeper.start()
        stack.push_async_callback(keeper.stop)
        router = Router(
            view,
            Placement(view, lambda: keeper.channel),
            resume_timeout_s=60.0,
            transport=transport,
        )
        stack.push_async_callback(router.close)
        yield LiveCluster(address, view, router, beaten, transport)
