"""The verifier's replica: a target on its own thread behind its own gRPC server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import ray
from ray import serve

from dspark.applications import VERIFIER, Reconfiguring
from dspark.config import ServeConfig
from dspark.engine.assembly import load_target, make_verifier
from dspark.engine.runner import EngineRunner
from dspark.engine.threads import compute_apart
from dspark.pb import scheduler_pb2, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.lease import LeaseKeeper
from dspark.rpc.pooled_draft_link import PooledDraftLink
from dspark.rpc.reserved import with_threads
from dspark.rpc.scheduler_address import scheduler_of
from dspark.rpc.server import ReplicaServer
from dspark.rpc.step_times import SharedStepTimes
from dspark.rpc.transport import open_transport
from dspark.scheduling.autoscaling.options import verifier_options
from dspark.scheduling.autoscaling.signals import to_stats
from dspark.services.verifier.coordination import Coordinator, load_to_pb
from dspark.services.verifier.servicer import VerifierServicer

log = logging.getLogger(__name__)

_DRAIN_S = 30.0


@serve.deployment(
    name=VERIFIER.name,
    user_config={},  # so that one that is taken away again is noticed
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
    ray_actor_options={"num_cpus": 0},
)
class VerifierReplica:
    """Loads the target, then serves and beats until it is stopped."""

    # Serve awaits it; what starts here lives on the replica's event loop.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._config, self._reconfiguring = config, Reconfiguring()
        self._incarnation = f"verifier-{uuid4().hex[:12]}"
        transport = open_transport(config.network)  # before what takes long, since it may refuse
        model, locate = with_threads(config.model), scheduler_of(config.scheduler.application)
        loaded = await compute_apart(load_target, model)
        self._target = loaded.target
        self._servicer = VerifierServicer(model.target, asyncio.get_running_loop())
        self._link: PooledDraftLink | None = None
        if loaded.has_drafter:
            self._link = PooledDraftLink(
                self._incarnation,
                loaded.drafter_fingerprint,
                loaded.target.vocab_size,
                transport=transport,
            )
        shared = SharedStepTimes(locate, transport=transport)
        engine = await compute_apart(
            make_verifier, loaded, config.engine, self._link, shared=shared
        )
        host = ray.util.get_node_ip_address()
        self._server = ReplicaServer(certificates=transport.certificates)
        verifier_pb2_grpc.add_VerifierServicer_to_server(self._servicer, self._server.server)
        descriptor = verifier_pb2.DESCRIPTOR.services_by_name["Verifier"]
        port = await self._server.start(host, config.network.ports(), [descriptor])
        self._address = f"{host}:{port}"
        self._lease = LeaseKeeper(
            replica=scheduler_pb2.Replica(
                role=scheduler_pb2.ROLE_VERIFIER,
                incarnation=self._incarnation,
                address=self._address,
                model=model.target,
                drafter_fingerprint=loaded.drafter_fingerprint,
                max_context_tokens=min(loaded.target.max_positions, config.engine.cache_tokens),
                step_times_fingerprint="" if engine.table is None else engine.table.fingerprint,
            ),
            locate=locate,
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
        log.info("verifier %s serves %s at %s", self._incarnation, model.target, self._address)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on by what `user_config` changes."""
        with self._reconfiguring.taking():
            changed = VERIFIER.changed(self._config, user_config)
            await asyncio.wrap_future(self._runner.reconfigure(changed.engine))

    async def address(self) -> str:
        """host:port of this replica's gRPC server; for operators."""
        return self._address

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks every so often, and hands it to the autoscaling policy."""
        return to_stats(self._runner.signals())

    async def check_health(self) -> None:
        """Raises when the engine failed or hangs, or the server does not answer.

        Serve then replaces us.
        """
        self._servicer.check()
        await self._server.check()

    async def __del__(self) -> None:
        """Drain: nothing new, send away who waits, let streams finish for a while, then stop.

        What has not finished by then is ended here, and gateways go on with it elsewhere.
        """
        await self._lease.drain()
        self._servicer.drain()
        await self._server.stop(_DRAIN_S)
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


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    replica: Any = VerifierReplica  # Serve's decorators are untyped
    return replica.options(**verifier_options(config)).bind(config)


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config file; RayServeException if `args` are not its settings."""
    return deployment(VERIFIER.deployed(args))
