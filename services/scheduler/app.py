"""The scheduler as a Ray Serve deployment; there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray import serve

from dspark.config import ServeConfig
from dspark.pb import scheduler_pb2, scheduler_pb2_grpc
from dspark.rpc.server import ReplicaServer, check_serving
from dspark.scheduling.cluster import Cluster
from dspark.services.scheduler.kubernetes_access import open_watch
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.store import open_store

log = logging.getLogger(__name__)

_DRAIN_S = 1.0


@serve.deployment(
    name="scheduler",
    num_replicas=1,
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
    ray_actor_options={"num_cpus": 0},
)
class Scheduler:
    """Its own gRPC server; replicas find it through `grpc_address`."""

    # Serve awaits it; the server that starts here lives on the replica's event loop.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._store = open_store(config.scheduler.store_url)
        cluster = Cluster(config.scheduler.lease_s, time.monotonic)
        # Off the loop: a kubeconfig may run a program for credentials.
        self._watch = await asyncio.to_thread(open_watch, config.scheduler.kubernetes)
        servicer = SchedulerServicer(config, cluster, self._store, self._watch)
        await servicer.restore()
        self._server = ReplicaServer()
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, self._server.server)
        host = ray.util.get_node_ip_address()
        descriptor = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]
        port = await self._server.start(host, 0, [descriptor])
        self._address = f"{host}:{port}"
        log.info("scheduler at %s", self._address)

    async def grpc_address(self) -> str:
        """host:port of dspark.v1.Scheduler."""
        return self._address

    async def check_health(self) -> None:
        """Raises when Serve should replace this replica."""
        await check_serving(self._address)

    async def __del__(self) -> None:
        """Stop the server; everyone goes on with what they last heard."""
        server: ReplicaServer | None = getattr(self, "_server", None)
        if server is not None:  # else the constructor failed
            if self._watch is not None:
                self._watch.stop()
            await server.stop(_DRAIN_S)
            await asyncio.wait_for(self._store.close(), _DRAIN_S)


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    scheduler: Any = Scheduler  # Serve's decorators are untyped
    return scheduler.bind(config)
