"""A draft replica put together: a drafter on its own thread behind its own gRPC server.

Needs no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from uuid import uuid4

from dspark.config import DraftConfig, ServeConfig
from dspark.engine.assembly import load_draft_engine
from dspark.engine.threads import compute_apart
from dspark.models.checkpoint import fingerprint
from dspark.models.drafter_folder import drafter_folder
from dspark.pb import draft_pb2, draft_pb2_grpc, scheduler_pb2
from dspark.rpc.lease import LeaseKeeper, Locate
from dspark.rpc.server import ReplicaServer
from dspark.rpc.transport import open_transport
from dspark.scheduling.autoscaling.signals import DraftSignals, Share
from dspark.services.draft.servicer import DraftServicer
from dspark.services.draft.worker import DraftWorker

log = logging.getLogger(__name__)


class DraftService:
    """Make it, `start` it on the event loop that serves it, and `stop` it to leave.

    ConfigError if its certificates would not be believed: before a model is loaded.
    """

    def __init__(self, config: ServeConfig, locate: Locate) -> None:
        self._config, self._locate = config, locate
        self._incarnation = f"draft-{uuid4().hex[:12]}"
        self._transport = open_transport(config.network)
        self._server = ReplicaServer(certificates=self._transport.certificates)

    async def start(self, host: str) -> None:
        """Load the drafter, listen at `host` and beat."""
        config, model = self._config, self._config.model
        folder = drafter_folder(model)
        engine = await compute_apart(load_draft_engine, model, config.draft)
        assert folder is not None  # load_draft_engine has refused otherwise
        weights = fingerprint(folder)
        self._worker = DraftWorker(engine, config.draft.max_batch_works, self._failed)
        self._busy = Share(0.0, time.monotonic())  # for autoscaling
        self._busy_beat = Share(0.0, time.monotonic())  # for the scheduler
        self._worker.start()
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
        address = f"{host}:{port}"
        self._lease = LeaseKeeper(
            replica=scheduler_pb2.Replica(
                role=scheduler_pb2.ROLE_DRAFT,
                incarnation=self._incarnation,
                address=address,
                model=model.target,
                drafter_fingerprint=weights,
            ),
            locate=self._locate,
            load=self._load,
            on_beat=lambda _: None,
            interval_s=config.scheduler.heartbeat_s,
            transport=self._transport,
        )
        self._lease.start()
        log.info("draft %s serves %s at %s", self._incarnation, model.target, address)

    def reconfigure(self, draft: DraftConfig) -> None:
        """Go on by these settings."""
        self._worker.max_batch_works = draft.max_batch_works
        self._servicer.max_streams = draft.max_streams

    def signals(self) -> DraftSignals:
        """For autoscaling, since the last time."""
        return DraftSignals(self._busy.look(self._worker.busy_s, time.monotonic()))

    async def check(self) -> None:
        """Raises when the engine failed or hangs, or the server does not answer."""
        self._worker.check(self._config.draft.max_run_s)
        await self._server.check()

    async def stop(self, drain_s: float) -> None:
        """Leave the pool, close streams, stop."""
        await self._lease.drain()
        await self._server.stop(drain_s)
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
