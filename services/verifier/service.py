"""A verifier put together: a target on its own thread behind its own gRPC server. Needs no Ray."""

from __future__ import annotations

import asyncio
import logging
from uuid import uuid4

from dspark.config import EngineConfig, ServeConfig
from dspark.engine.assembly import load_target, make_verifier
from dspark.engine.runner import EngineRunner
from dspark.engine.threads import compute_apart
from dspark.pb import scheduler_pb2, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.lease import LeaseKeeper, Locate
from dspark.rpc.pooled_draft_link import PooledDraftLink
from dspark.rpc.server import ReplicaServer
from dspark.rpc.step_times import SharedStepTimes
from dspark.rpc.transport import open_transport
from dspark.scheduling.autoscaling.signals import VerifierSignals
from dspark.services.verifier.coordination import Coordinator, load_to_pb
from dspark.services.verifier.servicer import VerifierServicer

log = logging.getLogger(__name__)


class VerifierService:
    """Make it, `start` it on the event loop that serves it, and `stop` it to leave.

    ConfigError if its certificates would not be believed: before a model is loaded.
    """

    def __init__(self, config: ServeConfig, locate: Locate) -> None:
        self._config, self._locate = config, locate
        self._incarnation = f"verifier-{uuid4().hex[:12]}"
        self._transport = open_transport(config.network)
        self._server = ReplicaServer(certificates=self._transport.certificates)
        self._link: PooledDraftLink | None = None
        self.address = ""  # host:port of the gRPC server, once there is one

    async def start(self, host: str) -> None:
        """Load the target, listen at `host` and beat."""
        config, transport = self._config, self._transport
        self._servicer = VerifierServicer(config.model.target, asyncio.get_running_loop())
        loaded = await compute_apart(load_target, config.model)
        self._target = loaded.target
        if loaded.has_drafter:
            self._link = PooledDraftLink(
                self._incarnation,
                loaded.drafter_fingerprint,
                loaded.target.vocab_size,
                transport=transport,
            )
        shared = SharedStepTimes(self._locate, transport=transport)
        engine = await compute_apart(
            make_verifier, loaded, config.engine, self._link, shared=shared
        )
        verifier_pb2_grpc.add_VerifierServicer_to_server(self._servicer, self._server.server)
        descriptor = verifier_pb2.DESCRIPTOR.services_by_name["Verifier"]
        port = await self._server.start(host, config.network.ports(), [descriptor])
        self.address = f"{host}:{port}"
        self._lease = LeaseKeeper(
            replica=scheduler_pb2.Replica(
                role=scheduler_pb2.ROLE_VERIFIER,
                incarnation=self._incarnation,
                address=self.address,
                model=config.model.target,
                drafter_fingerprint=loaded.drafter_fingerprint,
                max_context_tokens=min(loaded.target.max_positions, config.engine.cache_tokens),
                step_times_fingerprint="" if engine.table is None else engine.table.fingerprint,
            ),
            locate=self._locate,
            load=lambda: load_to_pb(self._runner),
            on_beat=self._heard,
            interval_s=config.scheduler.heartbeat_s,
            transport=transport,
        )
        self._coordinator = Coordinator(
            self._incarnation,
            lambda: self._lease.channel,
            on_plan=lambda plan: self._runner.set_plan(plan),
            on_calibration=lambda table: self._runner.set_calibration(table),
        )
        self._runner = EngineRunner(
            engine,
            on_results=self._servicer.deliver,
            on_refused=self._servicer.refuse,
            on_report=self._coordinator.report,
            on_failure=self._servicer.fail,
        )
        self._servicer.attach(self._runner)
        self._runner.start()
        self._lease.start()
        self._coordinator.start()
        log.info(
            "verifier %s serves %s at %s", self._incarnation, config.model.target, self.address
        )

    async def reconfigure(self, engine: EngineConfig) -> None:
        """Go on by these settings."""
        await asyncio.wrap_future(self._runner.reconfigure(engine))

    def signals(self) -> VerifierSignals:
        """For autoscaling."""
        return self._runner.signals()

    async def check(self) -> None:
        """Raises when the engine failed or hangs, or the server does not answer."""
        self._servicer.check()
        await self._server.check()

    async def stop(self, drain_s: float) -> None:
        """Drain: nothing new, send away who waits, let streams finish for so long, then stop.

        What has not finished by then is ended here, and gateways go on with it elsewhere.
        """
        await self._lease.drain()
        self._servicer.drain()
        await self._server.stop(drain_s)
        await self._coordinator.stop()
        await self._lease.stop()
        if self._link is not None:
            await self._link.stop()
        await asyncio.to_thread(self._runner.stop)
        await asyncio.to_thread(self._target.close)

    def _heard(self, beat: scheduler_pb2.HeartbeatResponse) -> None:
        shares = {one.draft.address: one.share for one in beat.drafts if 0.0 < one.share <= 1.0}
        # No draft assigned may only mean that the scheduler has just restarted: keep the peers.
        if self._link is not None and shares:
            self._link.set_peers(shares)
