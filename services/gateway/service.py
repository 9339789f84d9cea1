"""A gateway put together: cluster view, generator, gRPC server and lease. Needs no Ray."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from fastapi import FastAPI

from dspark.config import ServeConfig
from dspark.pb import scheduler_pb2
from dspark.rpc.certificates import public_certificates
from dspark.rpc.lease import LeaseKeeper, Locate
from dspark.rpc.options import MAX_PUBLIC_MESSAGE_BYTES
from dspark.rpc.server import ReplicaServer
from dspark.rpc.transport import open_transport
from dspark.services.gateway.api_keys import ApiKeys
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.detokenize import decoder_factory
from dspark.services.gateway.generation import Generator
from dspark.services.gateway.grpc_servicer import SERVICE, InferenceServicer
from dspark.services.gateway.openai_api import Health, create_app
from dspark.services.gateway.placement import Placement
from dspark.services.gateway.router import FIRST_WAIT_S, Router
from dspark.services.gateway.tokenizing import PromptEncoder


class GatewayService:
    """Make it, `start` it on the event loop that serves it, and `stop` it to drain."""

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Any,
        locate_scheduler: Locate,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self._config, self._locate = config, locate_scheduler
        self._keeper: LeaseKeeper | None = None
        self._transport = open_transport(config.network)
        model, gateway = config.model.target, config.gateway
        self.cluster = ClusterView(model)
        placement = Placement(
            self.cluster,
            lambda: None if self._keeper is None else self._keeper.channel,
            config.engine.prefix_cache,
        )
        self._router = Router(
            self.cluster,
            placement,
            gateway.resume_timeout_s,
            first_wait_s,
            transport=self._transport,
        )
        self.generator = Generator(
            model,
            PromptEncoder(tokenizer),
            decoder_factory(tokenizer),
            self._router,
            self.cluster,
            gateway.max_in_flight,
            config.engine.service_class,
            first_wait_s,
        )
        self._keys = ApiKeys(gateway.api_keys_folder) if gateway.api_keys_folder else None
        self._server = ReplicaServer(
            MAX_PUBLIC_MESSAGE_BYTES,
            certificates=public_certificates(gateway.tls),
            checks=[self._keys.check] if self._keys else [],
        )

    async def start(self) -> int:
        """Listen for gRPC and register with the scheduler; returns the port."""
        gateway = self._config.gateway
        InferenceServicer(self.generator).add_to(self._server.server)
        port = await self._server.start(gateway.grpc_host, gateway.grpc_port, [SERVICE])
        replica = scheduler_pb2.Replica(
            role=scheduler_pb2.ROLE_GATEWAY,
            incarnation=uuid4().hex,
            address=f"{gateway.grpc_host}:{port}",
        )
        self._keeper = LeaseKeeper(
            replica,
            self._locate,
            lambda: scheduler_pb2.Load(running=self.generator.in_flight),
            self.cluster.heard,
            self._config.scheduler.heartbeat_s,
            transport=self._transport,
        )
        self._keeper.start()
        return port

    def reconfigure(self, config: ServeConfig) -> None:
        """New requests go by these bounds and service classes; those under way go on."""
        self.generator.reconfigure(config.gateway.max_in_flight, config.engine.service_class)
        self._router.resume_timeout_s = config.gateway.resume_timeout_s

    def http_app(self) -> FastAPI:
        """The HTTP side, to be served by whoever owns the port."""
        return create_app(self.generator, self.health, self._keys)

    def health(self) -> Health:
        """Whether a new request would find its way.

        It does without a scheduler, by what was heard last. And where probes ask, a gateway that
        is not well gets no traffic: all of them would be out of service at once.
        """
        silent_s, lease_s = self.cluster.silent_s, self._config.scheduler.lease_s
        if not self.cluster.verifiers:
            return Health(False, f"no verifier of {self.generator.model!r} is known")
        if silent_s > lease_s:
            return Health(True, f"the scheduler has not answered for {silent_s:.0f} s")
        return Health(True)

    async def check(self) -> None:
        """Dial the own gRPC server; raises if it does not answer."""
        await self._server.check()

    async def stop(self, grace_s: float) -> None:
        """Leave: take nothing new, let streams finish for `grace_s`, then close everything."""
        await self._server.leave()  # who balances by health goes elsewhere, not to be refused
        if self._keeper is not None:
            await self._keeper.drain()
        await self.generator.drain(grace_s)
        await self._server.stop(1.0)  # what is not through by now is cancelled
        if self._keeper is not None:
            await self._keeper.stop()
        await self._router.close()
