"""The draft service's replica: a drafter on its own thread behind its own gRPC server."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import ray
from ray import serve

from dspark.applications import DRAFT, Reconfiguring
from dspark.config import ServeConfig
from dspark.engine.assembly import drafter_folder, load_draft_engine
from dspark.engine.threads import compute_apart
from dspark.models.checkpoint import fingerprint
from dspark.pb import draft_pb2, draft_pb2_grpc, scheduler_pb2
from dspark.rpc.lease import LeaseKeeper
from dspark.rpc.reserved import with_threads
from dspark.rpc.scheduler_address import scheduler_of
from dspark.rpc.server import ReplicaServer
from dspark.rpc.transport import open_transport
from dspark.scheduling.autoscaling.options import draft_options
from dspark.scheduling.autoscaling.signals import DraftSignals, Share, to_stats
from dspark.services.draft.servicer import DraftServicer
from dspark.services.draft.worker import DraftWorker

log = logging.getLogger(__name__)

_DRAIN_S = 2.0  # nothing is lost when a draft stream ends


@serve.deployment(
    name=DRAFT.name,
    user_config={},  # so that one that is taken away again is noticed
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
    ray_actor_options={"num_cpus": 0},
)
class DraftReplica:
    """Loads the drafter, then serves and beats until it is stopped."""

    # Serve awaits it; what starts here lives on the replica's event loop.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._config, self._reconfiguring = config, Reconfiguring()
        self._incarnation = f"draft-{uuid4().hex[:12]}"
        transport = open_transport(config.network)  # before what takes long, since it may refuse
        model = with_threads(config.model)
        folder = drafter_folder(model)
        engine = await compute_apart(load_draft_engine, model, config.draft)
        assert folder is not None  # load_draft_engine has refused otherwise
        weights = fingerprint(folder)
        self._worker = DraftWorker(engine, config.draft.max_batch_works, self._failed)
        self._busy = Share(0.0, time.monotonic())  # for autoscaling
        self._busy_beat = Share(0.0, time.monotonic())  # for the scheduler
        self._worker.start()
        host = ray.util.get_node_ip_address()
        self._server = ReplicaServer(certificates=transport.certificates)
        self._servicer = DraftServicer(
            self._worker,
            engine,
            incarnation=self._incarnation,
            drafter_fingerprint=weights,
            max_streams=config.draft.max_streams,
        )
        draft_pb2_grpc.add_DraftServicer_to_server(self._servicer, self._server.server)
        descriptor = draft_pb2.DESCRIPTOR.services_by_name["Draft"]
        port = await self._server.start(host, config.network.ports(), [descriptor])
        self._address = f"{host}:{port}"
        self._lease = LeaseKeeper(
            replica=scheduler_pb2.Replica(
                role=scheduler_pb2.ROLE_DRAFT,
                incarnation=self._incarnation,
                address=self._address,
                model=model.target,
                drafter_fingerprint=weights,
            ),
            locate=scheduler_of(config.scheduler.application),
            load=self._load,
            on_beat=lambda _: None,
            interval_s=config.scheduler.heartbeat_s,
            transport=transport,
        )
        self._lease.start()
        log.info("draft %s serves %s at %s", self._incarnation, model.target, self._address)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on by what `user_config` changes."""
        with self._reconfiguring.taking():
            draft = DRAFT.changed(self._config, user_config).draft
            self._worker.max_batch_works = draft.max_batch_works
            self._servicer.max_streams = draft.max_streams

    async def pid(self) -> int:
        """This process; for operators and fault tests."""
        return os.getpid()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks every so often, and hands it to the autoscaling policy."""
        return to_stats(DraftSignals(self._busy.look(self._worker.busy_s, time.monotonic())))

    async def check_health(self) -> None:
        """Raises when the engine failed or hangs, or the server does not answer.

        Serve then replaces us.
        """
        self._worker.check(self._config.draft.max_run_s)
        await self._server.check()

    async def __del__(self) -> None:
        """Leave the pool, close streams, stop."""
        await self._lease.drain()
        await self._server.stop(_DRAIN_S)
        await self._servicer.ended()
        await self._lease.stop()
        await asyncio.to_thread(self._worker.stop)

    def _load(self) -> scheduler_pb2.Load:
        worker = self._worker
        return scheduler_pb2.Load(
            running=worker.sessions,
            busy_share=self._busy_beat.look(worker.busy_s, time.monotonic()),
            queued_works=worker.most_waiting(),
            works_per_s=worker.works_per_s,
        )

    def _failed(self, error: BaseException) -> None:
        log.error("this replica asks to be replaced: %s", error)


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    replica: Any = DraftReplica  # Serve's decorators are untyped
    return replica.options(**draft_options(config)).bind(config)


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config file; RayServeException if `args` are not its settings."""
    return deployment(DRAFT.deployed(args))
