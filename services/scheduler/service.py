"""A scheduler put together: servicer, gRPC server, and its part in the election. Needs no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from dspark.config import EngineConfig, SchedulerConfig, ServeConfig
from dspark.pb import scheduler_pb2, scheduler_pb2_grpc
from dspark.rpc.certificates import service_certificates
from dspark.rpc.server import ReplicaServer
from dspark.scheduling.cluster import Cluster
from dspark.services.scheduler.kubernetes_access import open_watch
from dspark.services.scheduler.kubernetes_election import KubernetesElection
from dspark.services.scheduler.leadership import Election, Leadership, StoreElection
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.store import Store, open_store

if TYPE_CHECKING:
    from dspark.services.scheduler.kubernetes_watch import KubernetesWatch

log = logging.getLogger(__name__)


class SchedulerService:
    """Make it, `start` it on the event loop that serves it, and `stop` it to leave."""

    def __init__(
        self,
        config: ServeConfig,
        store: Store | None = None,  # None: the configured one
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock = config, clock
        self._store = store or open_store(
            config.scheduler.store_url, config.scheduler.store_password_file
        )
        self._leadership = Leadership(
            _election(config.scheduler, self._store),
            config.scheduler.leader_lease_s,
            sole=config.scheduler_replicas == 1,
            clock=clock,
        )
        self._watch: KubernetesWatch | None = None
        self._servicer: SchedulerServicer | None = None
        self._server = ReplicaServer(certificates=service_certificates(config.network.tls))
        self.address = ""

    @property
    def leader(self) -> str:
        """host:port of the scheduler that leads, as far as known; else this one, which says so."""
        return self._leadership.leader or self.address

    async def start(self, host: str, port: int | None = None) -> str:
        """Listen and stand for election; returns host:port. An elected one has its store read.

        `port` None: as configured.
        """
        ports = self._config.network.ports() if port is None else port
        settings = self._config.scheduler
        # Off the loop: a kubeconfig may run a program for credentials.
        self._watch = await asyncio.to_thread(open_watch, settings.kubernetes)
        cluster = Cluster(settings.lease_s, self._clock)
        self._servicer = servicer = SchedulerServicer(
            self._config, cluster, self._store, self._leadership, self._watch
        )
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, self._server.server)
        descriptor = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]
        self.address = f"{host}:{await self._server.start(host, ports, [descriptor])}"
        await self._leadership.start(self.address, servicer.take_over)
        log.info("scheduler at %s; the leader is %s", self.address, self.leader)
        return self.address

    def reconfigure(self, engine: EngineConfig) -> None:
        """Plan by these settings from now on; verifiers are told at once. `start` it first."""
        assert self._servicer is not None
        self._servicer.reconfigure(engine)

    async def check(self) -> None:
        """Dial the own gRPC server; raises if it does not answer."""
        await self._server.check()

    async def stop(self, grace_s: float) -> None:
        """Let another lead, then stop; everyone goes on with what they last heard."""
        if self._watch is not None:
            self._watch.stop()
        await self._leadership.stop()
        await self._server.stop(grace_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._store.close(), 1.0)


def _election(settings: SchedulerConfig, store: Store) -> Election:
    if settings.leader_election == "kubernetes":
        return KubernetesElection(settings.kubernetes_namespace, settings.kubernetes_lease)
    return StoreElection(store)
