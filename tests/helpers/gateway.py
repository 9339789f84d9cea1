"""A whole gateway over fake peers: the service itself, gRPC and HTTP on real ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import uvicorn
from helpers.fake_services import FakeScheduler, FakeVerifier, Oracle
from helpers.tokenizer import EOS, byte_level

from dspark.config import (
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    SchedulerConfig,
    ServeConfig,
    ServiceClass,
)
from dspark.pb import inference_pb2_grpc
from dspark.services.gateway.service import GatewayService

MODEL = "tiny"
ANSWER = "The quick brown fox 🎉 jumps over the lazy dog, one two three four five."


@dataclass(slots=True)
class Cluster:
    """The gateway and its peers."""

    service: GatewayService
    scheduler: FakeScheduler
    verifiers: list[FakeVerifier]
    port: int
    channel: Any
    tokenizer: Any
    answer_ids: list[int]

    @property
    def verifier(self) -> FakeVerifier:
        return self.verifiers[0]

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)

    def http(self) -> httpx.AsyncClient:
        """Against the app itself: no streaming, no disconnects."""
        transport = httpx.ASGITransport(self.service.http_app(), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Base URL of a real HTTP server."""
        config = uvicorn.Config(
            self.service.http_app(), host="127.0.0.1", port=0, log_level="error", lifespan="off"
        )
        server = uvicorn.Server(config)
        socket = config.bind_socket()
        serving = asyncio.create_task(server.serve([socket]))
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def running_gateway(
    *,
    verifiers: int = 1,
    answer: str = ANSWER,
    tokenizer: Any = None,
    wait: bool = True,
    first_wait_s: float = 5.0,
    context_tokens: int = 512,
    heartbeat_s: float = 0.05,
    classes: Mapping[str, ServiceClass] | None = None,
    **gateway: Any,
) -> AsyncIterator[Cluster]:
    """Starts everything; `wait` for the gateway to have heard of the verifiers."""
    tokenizer = tokenizer or byte_level()
    eos = tokenizer.convert_tokens_to_ids(EOS)
    answer_ids = [*tokenizer(answer)["input_ids"], eos]
    oracle = Oracle(answer_ids)
    async with AsyncExitStack() as stack:
        hosts = []
        for _ in range(verifiers):
            host = FakeVerifier(
                oracle, model=MODEL, stop_token_id=eos, context_tokens=context_tokens
            )
            hosts.append(await host.start())
            stack.push_async_callback(host.kill)
        scheduler = await FakeScheduler(*hosts).start()
        stack.push_async_callback(scheduler.kill)
        config = ServeConfig(
            model=ModelConfig(target=MODEL),
            engine=EngineConfig(classes=classes or {}),
            scheduler=SchedulerConfig(heartbeat_s=heartbeat_s),
            gateway=GatewayConfig(**{"grpc_port": 0, "resume_timeout_s": 20.0, **gateway}),
        )

        async def locate() -> str:
            return scheduler.address

        service = GatewayService(config, tokenizer, locate, first_wait_s)
        port = await service.start()
        stack.push_async_callback(service.stop, grace_s=0.0)
        if wait:
            assert await service.cluster.wait_known(10)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Cluster(service, scheduler, hosts, port, channel, tokenizer, answer_ids)
