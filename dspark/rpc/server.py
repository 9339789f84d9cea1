"""A replica's own gRPC server, with the standard health service and reflection."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dspark.errors import ConfigError
from dspark.rpc.options import MAX_MESSAGE_BYTES, server_options


class ReplicaServer:
    """Make it, add servicers to `server`, `start`, and `stop` to drain."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.server = grpc.aio.server(options=server_options(max_message_bytes))
        self._health = health.aio.HealthServicer()
        self.port = 0

    async def start(self, host: str, port: int, services: Sequence[ServiceDescriptor]) -> int:
        """Listen, report SERVING for `services`, and return the port; 0 asks for any free one.

        Raises ConfigError when the port is taken.
        """
        names = [service.full_name for service in services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        known = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(known, self.server)
        try:
            self.port = self.server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: the port is probably in use; stop what holds it "
                "or choose another"
            ) from error
        await self.server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let calls under way finish for `grace_s`, then close."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def check_serving(address: str, timeout_s: float = 2.0) -> None:
    """Dial a replica's health service; grpc.aio.AioRpcError or RuntimeError if it is not well."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"{address} reports health status {answer.status}")
