"""A replica's own gRPC server, with the standard health service and reflection."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dspark.errors import ConfigError
from dspark.rpc.certificates import CertificateFiles
from dspark.rpc.guard import Check, Guard, not_by_file, only_services
from dspark.rpc.options import MAX_MESSAGE_BYTES, server_options
from dspark.rpc.transport import server_credentials

log = logging.getLogger(__name__)


class ReplicaServer:
    """Make it, add servicers to `server`, `start`, and `stop` to drain.

    With `certificates` it speaks TLS alone. `checks` say who may call anything but the health
    service.
    """

    def __init__(
        self,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        *,
        certificates: CertificateFiles | None = None,
        checks: Sequence[Check] = (),
    ) -> None:
        self._certificates = certificates
        if certificates is not None:
            checks = (not_by_file, *([only_services] if certificates.service else []), *checks)
        self.server = grpc.aio.server(
            interceptors=[Guard(checks)] if checks else [],
            options=server_options(max_message_bytes),
        )
        self._health = health.aio.HealthServicer()
        self._folder: Path | None = None  # of the socket file, with TLS
        self._own_address = ""
        self.port = 0

    async def start(
        self, host: str, port: int | range, services: Sequence[ServiceDescriptor]
    ) -> int:
        """Listen, report SERVING for `services`, and return the port.

        0 asks for any free one; of a range, the first free one is taken. Raises ConfigError when
        all are taken.
        """
        names = [service.full_name for service in services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        known = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(known, self.server)
        self.port = self._listen(host, range(port, port + 1) if isinstance(port, int) else port)
        self._own_address = f"{host}:{self.port}"
        if self._certificates is not None:
            self._own_address = f"unix:{self._listen_by_file()}"
        await self.server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    async def check(self, timeout_s: float = 2.0) -> None:
        """Dial the own health service; grpc.aio.AioRpcError or RuntimeError if it is not well."""
        if self._certificates is not None:
            self._certificates.current()  # says in the log if they have expired
        await check_serving(self._own_address, timeout_s)

    async def leave(self) -> None:
        """Report NOT_SERVING from now on; calls are still answered."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let calls under way finish for `grace_s`, then close."""
        await self.leave()
        await self.server.stop(grace_s)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _listen(self, host: str, ports: range) -> int:
        for port in ports:
            try:
                return self._bind(f"{host}:{port}")
            except RuntimeError:
                if len(ports) > 1:
                    log.info("port %d of %s is in use", port, host)
        if len(ports) > 1:
            raise ConfigError(
                f"cannot listen on {host}: every port from {ports[0]} to {ports[-1]} is in use; "
                "make network.replica_ports wider, or stop what holds them"
            )
        raise ConfigError(
            f"cannot listen on {host}:{ports[0]}: the port is probably in use; stop what holds it "
            "or choose another"
        )

    def _bind(self, address: str) -> int:
        if self._certificates is None:
            port: int = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, server_credentials(self._certificates))
        return port

    def _listen_by_file(self) -> Path:
        """A socket that this user alone can open, for the own health checks.

        They ask whether the process answers. By TLS they would also ask whether the certificate is
        valid, and a late renewal would end every replica instead of new connections alone.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="dspark-"))
        path = self._folder / "health.sock"
        try:
            self.server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {path}, for health checks: set TMPDIR to a folder of a short "
                "name that can be written to"
            ) from error
        return path


async def check_serving(address: str, timeout_s: float = 2.0) -> None:
    """Dial a health service in plaintext; AioRpcError or RuntimeError if it is not well."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"{address} reports health status {answer.status}")
