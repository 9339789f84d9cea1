"""dspark.v1.Scheduler over a Cluster: decode, check, decide, encode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from dspark.config import ServeConfig
from dspark.errors import DSparkError, InvalidRequestError, UnavailableError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.status import abort
from dspark.scheduling.cluster import Cluster, Load, Member, Replica, Role
from dspark.services.scheduler.calibrations import Calibrations, Follower
from dspark.services.scheduler.load_report import load_to_pb
from dspark.services.scheduler.plans import RENEW_AFTER_S, plan_for
from dspark.services.scheduler.step_times import StepTimes
from dspark.services.scheduler.throughputs import Throughputs
from dspark.store import Store
from dspark.wire.bounds import MAX_ID_CHARS
from dspark.wire.plans import plan_to_pb

if TYPE_CHECKING:  # it needs an extra
    from dspark.services.scheduler.kubernetes_watch import KubernetesWatch

log = logging.getLogger(__name__)

_ROLES: dict[int, Role] = {
    pb.ROLE_VERIFIER: Role.VERIFIER,
    pb.ROLE_DRAFT: Role.DRAFT,
    pb.ROLE_GATEWAY: Role.GATEWAY,
}
_ROLE_NUMBERS: dict[Role, Any] = {role: number for number, role in _ROLES.items()}
_REGISTRY = "registry/"
_MAX_TEXT = 1024


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """The cluster's view, kept in memory and copied to the store."""

    def __init__(
        self,
        config: ServeConfig,
        cluster: Cluster,
        store: Store,
        kubernetes: KubernetesWatch | None = None,
    ) -> None:
        self._config, self._cluster, self._store = config, cluster, store
        self._kubernetes = kubernetes
        self._reports: dict[str, pb.StepReport] = {}
        self._calibrations = Calibrations(cluster, store)
        self._step_times = StepTimes(store)
        self.throughputs = Throughputs(config.scheduler.throughput_alarm)
        self._epoch = 0
        self._store_down = False

    async def restore(self) -> None:
        """Take in what an earlier scheduler knew; each replica has one lease to show itself."""
        try:
            kept = await self._store.list(_REGISTRY)
            for value in kept.values():
                beat = pb.HeartbeatRequest.FromString(value)
                self._cluster.beat(_replica(beat.replica), _load(beat.load), beat.draining)
            await self._calibrations.restore()
        except UnavailableError as error:
            self._note_store(error)

    async def Heartbeat(  # noqa: N802 - the name is the contract's
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> pb.HeartbeatResponse:
        """Renew a lease; answer what the replica needs to know of the others."""
        try:
            replica = _replica(request.replica)
        except DSparkError as error:
            await abort(context, error)
        self._cluster.beat(replica, _load(request.load), request.draining)
        await self._keep(replica.incarnation, request)
        answer = pb.HeartbeatResponse(lease_ms=round(self._config.scheduler.lease_s * 1000))
        if replica.role is Role.VERIFIER:
            draft = self._cluster.draft_for(replica.incarnation)
            if draft is not None:
                answer.draft.CopyFrom(_replica_to_pb(draft))
        elif replica.role is Role.GATEWAY:
            answer.verifiers.extend(_replica_to_pb(m.replica) for m in self._cluster.verifiers())
        return answer

    async def Place(  # noqa: N802
        self, request: pb.PlaceRequest, context: grpc.aio.ServicerContext
    ) -> pb.PlaceResponse:
        """Choose a verifier."""
        try:
            _bounded("request_id", request.request_id, MAX_ID_CHARS)
            _bounded("model", request.model, _MAX_TEXT)
            chosen = self._cluster.place(
                request.request_id, request.model, request.avoid_incarnations
            )
        except DSparkError as error:
            await abort(context, error)
        return pb.PlaceResponse(verifier=_replica_to_pb(chosen))

    async def Coordinate(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.StepReport],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Take reports in and push plans; neither waits for the other."""
        with self._calibrations.following() as verifier:
            pusher = asyncio.create_task(self._push_plans(context, verifier))
            try:
                async for report in request_iterator:
                    try:
                        _bounded("incarnation", report.incarnation, MAX_ID_CHARS)
                        verifier.introduce(report.incarnation)
                        self._take(report)
                    except DSparkError as error:
                        await abort(context, error)
            finally:
                pusher.cancel()
                await asyncio.gather(pusher, return_exceptions=True)

    async def DescribeCluster(  # noqa: N802
        self, request: pb.DescribeClusterRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeClusterResponse:
        """What is known."""
        members = self._cluster.members()
        self._forget_the_gone(members)
        return pb.DescribeClusterResponse(
            replicas=[self._status(m) for m in members],
            reports=self._reports.values(),
            calibrations=self._calibrations.statuses(),
            kubernetes=None if self._kubernetes is None else load_to_pb(self._kubernetes),
            throughputs=self.throughputs.statuses(),
        )

    async def GetStepTimes(  # noqa: N802
        self, request: pb.GetStepTimesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStepTimesResponse:
        """What a verifier of the same kind measured."""
        try:
            table = await self._step_times.get(request.fingerprint)
        except DSparkError as error:
            await abort(context, error)
        if table is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no step times of that fingerprint")
        return pb.GetStepTimesResponse(table=table)

    async def PutStepTimes(  # noqa: N802
        self, request: pb.PutStepTimesRequest, context: grpc.aio.ServicerContext
    ) -> pb.PutStepTimesResponse:
        """Keep what a verifier measured."""
        try:
            await self._step_times.put(request.table)
        except DSparkError as error:
            await abort(context, error)
        return pb.PutStepTimesResponse()

    def _take(self, report: pb.StepReport) -> None:
        last = self._reports.get(report.incarnation)
        if last is None:
            self._forget_the_gone(self._cluster.members())  # that it may have come after
        if last is None or report.step > last.step:  # the latest may come twice
            self._calibrations.take(report)
            self.throughputs.take(report)
        report.ClearField("outcomes")  # they are in the window now
        self._reports[report.incarnation] = report

    def _forget_the_gone(self, members: list[Member]) -> None:
        alive = {m.replica.incarnation for m in members}
        self._reports = {name: r for name, r in self._reports.items() if name in alive}
        self.throughputs.keep(alive)

    async def _push_plans(self, context: grpc.aio.ServicerContext, verifier: Follower) -> None:
        while True:
            self._epoch += 1
            verifier.changed.clear()
            plan = plan_for(self._config.engine, self._epoch)
            await context.write(plan_to_pb(plan, self._calibrations.table(verifier.incarnation)))
            with suppress(TimeoutError):
                # wait_for of Python 3.11 loses a cancellation that comes with the event.
                async with asyncio.timeout(RENEW_AFTER_S):
                    await verifier.changed.wait()

    def _status(self, member: Member) -> pb.ReplicaStatus:
        return pb.ReplicaStatus(
            replica=_replica_to_pb(member.replica),
            load=pb.Load(
                running=member.load.running,
                waiting=member.load.waiting,
                free_pages=member.load.free_pages,
                total_pages=member.load.total_pages,
            ),
            draining=member.draining,
            silent_ms=round(self._cluster.silent_s(member) * 1000),
        )

    async def _keep(self, incarnation: str, beat: pb.HeartbeatRequest) -> None:
        """Copy a lease to the store; without a store we are only slower to recover."""
        try:
            await self._store.put(
                _REGISTRY + incarnation, beat.SerializeToString(), self._config.scheduler.lease_s
            )
        except UnavailableError as error:
            self._note_store(error)
        else:
            if self._store_down:
                log.info("the store answers again")
            self._store_down = False

    def _note_store(self, error: UnavailableError) -> None:
        if not self._store_down:
            log.warning("going on from memory: %s", error)
        self._store_down = True


def _replica(message: pb.Replica) -> Replica:
    if message.role not in _ROLES:
        raise InvalidRequestError(f"a replica needs a role; got {message.role}", param="role")
    role = _ROLES[message.role]
    _bounded("incarnation", message.incarnation, MAX_ID_CHARS)
    _bounded("address", message.address, _MAX_TEXT)
    if role is not Role.GATEWAY:
        _bounded("model", message.model, _MAX_TEXT)
    if message.drafter_fingerprint:
        _bounded("drafter_fingerprint", message.drafter_fingerprint, MAX_ID_CHARS)
    return Replica(
        role=role,
        incarnation=message.incarnation,
        address=message.address,
        model=message.model,
        drafter_fingerprint=message.drafter_fingerprint,
        max_context_tokens=message.max_context_tokens,
    )


def _replica_to_pb(replica: Replica) -> pb.Replica:
    return pb.Replica(
        role=_ROLE_NUMBERS[replica.role],
        incarnation=replica.incarnation,
        address=replica.address,
        model=replica.model,
        drafter_fingerprint=replica.drafter_fingerprint,
        max_context_tokens=replica.max_context_tokens,
    )


def _load(message: pb.Load) -> Load:
    return Load(message.running, message.waiting, message.free_pages, message.total_pages)


def _bounded(name: str, text: str, limit: int) -> None:
    if not 0 < len(text) <= limit:
        raise InvalidRequestError(
            f"{name} must have 1 to {limit} characters; got {len(text)}", param=name
        )
