"""dspark.v1.Scheduler over a Cluster: decode, check, decide, encode."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from dspark.config import EngineConfig, ServeConfig
from dspark.errors import (
    DSparkError,
    FencedError,
    InvalidRequestError,
    NotLeaderError,
    UnavailableError,
)
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.status import abort
from dspark.scheduling.cluster import Cluster, Load, Member, Replica, Role
from dspark.scheduling.draft_quota import max_blocks
from dspark.services.scheduler.calibrations import Calibrations, Follower
from dspark.services.scheduler.leadership import Leadership, LeaderStore
from dspark.services.scheduler.load_report import load_to_pb
from dspark.services.scheduler.placing import Placing
from dspark.services.scheduler.plans import RENEW_AFTER_S, plan_for
from dspark.services.scheduler.step_times import StepTimes, check_fingerprint
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
# Meant to outlast a restart. Those that died before it are known again too, for one lease; after
# a longer absence replicas are learned of from their heartbeats.
_KEEP_S = 20.0
_MAX_TEXT = 1024


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """The cluster's view, kept in memory and copied to the store. Answers while it leads."""

    def __init__(
        self,
        config: ServeConfig,
        cluster: Cluster,
        store: Store,
        leadership: Leadership,
        kubernetes: KubernetesWatch | None = None,
    ) -> None:
        self._config, self._cluster, self._leadership = config, cluster, leadership
        self._engine = config.engine  # what plans say
        self._kubernetes = kubernetes
        self._store = LeaderStore(store, leadership)
        self._reports: dict[str, pb.StepReport] = {}
        self._calibrations = Calibrations(cluster, self._store)
        self._step_times = StepTimes(self._store)
        self._placing = Placing(config.scheduler, cluster, self._step_times)
        self.throughputs = Throughputs(config.scheduler.throughput_alarm)
        self._unkept: dict[str, pb.HeartbeatRequest] = {}  # by incarnation, the latest
        self._copying: asyncio.Task[None] | None = None
        self._store_down = False

    def reconfigure(self, engine: EngineConfig) -> None:
        """Plan by these settings, and tell the verifiers."""
        if engine != self._engine:
            self._engine = engine
            self._calibrations.tell()

    async def take_over(self, token: int) -> None:
        """Take in what an earlier leader knew; each replica has one lease to show itself."""
        try:
            await self._store.take_over(token)
            kept = await self._store.list(_REGISTRY)
            for key, value in kept.items():
                try:
                    beat = pb.HeartbeatRequest.FromString(value)
                    self._cluster.beat(_replica(beat.replica), _load(beat.load), beat.draining)
                except (DecodeError, InvalidRequestError) as error:
                    log.warning("ignored what the store holds as %.200s: %s", key, error)
            await self._calibrations.restore()
        except (UnavailableError, FencedError) as error:
            self._note_store(error)

    async def Heartbeat(  # noqa: N802 - the name is the contract's
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> pb.HeartbeatResponse:
        """Renew a lease; answer what the replica needs to know of the others."""
        try:
            self._leadership.require()
            replica, load = _replica(request.replica), _load(request.load)
        except DSparkError as error:
            await abort(context, error)
        self._cluster.beat(replica, load, request.draining)
        self._placing.heard(replica.incarnation)
        if replica.step_times_fingerprint:
            self._step_times.learn(replica.step_times_fingerprint)
        self._keep(replica.incarnation, request)
        answer = pb.HeartbeatResponse(lease_ms=round(self._config.scheduler.lease_s * 1000))
        if replica.role is Role.VERIFIER:
            answer.drafts.extend(
                pb.DraftShare(draft=_replica_to_pb(one.member.replica), share=one.share)
                for one in self._cluster.drafts_for(replica.incarnation)
            )
        elif replica.role is Role.GATEWAY:
            answer.verifiers.extend(_replica_to_pb(m.replica) for m in self._cluster.verifiers())
        return answer

    async def Place(  # noqa: N802
        self, request: pb.PlaceRequest, context: grpc.aio.ServicerContext
    ) -> pb.PlaceResponse:
        """Choose a verifier."""
        try:
            self._leadership.require()
            _bounded("request_id", request.request_id, MAX_ID_CHARS)
            _bounded("model", request.model, _MAX_TEXT)
            chosen = self._placing.place(request)
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
            reader = asyncio.create_task(self._take_reports(request_iterator, verifier))
            reader.add_done_callback(lambda _: verifier.changed.set())
            try:
                await self._push_plans(context, verifier, reader)
            except DSparkError as error:
                # No write is under way here: gRPC fails a call that is ended during its first.
                await abort(context, error)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def DescribeCluster(  # noqa: N802
        self, request: pb.DescribeClusterRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeClusterResponse:
        """What is known."""
        try:
            self._leadership.require()
        except DSparkError as error:
            await abort(context, error)
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

    async def _take_reports(
        self, reports: AsyncIterator[pb.StepReport], verifier: Follower
    ) -> None:
        async for report in reports:
            _bounded("incarnation", report.incarnation, MAX_ID_CHARS)
            verifier.introduce(report.incarnation)
            self._take(report)

    def _take(self, report: pb.StepReport) -> None:
        last = self._reports.get(report.incarnation)
        if last is None:
            self._forget_the_gone(self._cluster.members())  # that it may have come after
        if last is None or report.step > last.step:  # the latest may come twice
            self._calibrations.take(report)
            self._placing.take(report)
            self.throughputs.take(report)
        report.ClearField("outcomes")  # they are in the window now
        self._reports[report.incarnation] = report

    def _forget_the_gone(self, members: list[Member]) -> None:
        alive = {m.replica.incarnation for m in members}
        self._reports = {name: r for name, r in self._reports.items() if name in alive}
        self.throughputs.keep(alive)

    async def _push_plans(
        self, context: grpc.aio.ServicerContext, verifier: Follower, reader: asyncio.Task[None]
    ) -> None:
        """Until the reports end; raises what ended them."""
        while not reader.done():
            verifier.changed.clear()
            plan = plan_for(
                self._engine,
                self._leadership.next_epoch(),
                self._draft_quota(verifier.incarnation),
            )
            await context.write(plan_to_pb(plan, self._calibrations.table(verifier.incarnation)))
            with suppress(TimeoutError):
                # wait_for of Python 3.11 loses a cancellation that comes with the event.
                async with asyncio.timeout(RENEW_AFTER_S):
                    await verifier.changed.wait()
        reader.result()

    def _draft_quota(self, verifier: str) -> int:
        report = self._reports.get(verifier)
        drafts = self._cluster.drafts_for(verifier)
        if report is None or not all(one.member.saturated for one in drafts):
            return 0
        parts = [(one.share, one.member.load.works_per_s) for one in drafts]
        return max_blocks(parts, report.step_ms / 1000)

    def _status(self, member: Member) -> pb.ReplicaStatus:
        return pb.ReplicaStatus(
            replica=_replica_to_pb(member.replica),
            load=_load_to_pb(member.load),
            draining=member.draining,
            silent_ms=round(self._cluster.silent_s(member) * 1000),
        )

    def _keep(self, incarnation: str, beat: pb.HeartbeatRequest) -> None:
        """Have a lease copied to the store soon; the replica does not wait for that."""
        beat.DiscardUnknownFields()
        self._unkept[incarnation] = beat
        if self._copying is None or self._copying.done():
            self._copying = asyncio.create_task(self._copy())

    async def _copy(self) -> None:
        """Without a store we are only slower to recover."""
        while self._unkept:
            incarnation = next(iter(self._unkept))  # who has waited longest
            value = self._unkept.pop(incarnation).SerializeToString()
            ttl_s = max(_KEEP_S, self._config.scheduler.lease_s)
            try:
                await self._store.put(_REGISTRY + incarnation, value, ttl_s)
            except NotLeaderError:
                self._unkept.clear()  # the replicas will tell the leader
            except UnavailableError as error:
                self._note_store(error)
            else:
                if self._store_down:
                    log.info("the store answers again")
                self._store_down = False

    def _note_store(self, error: DSparkError) -> None:
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
    if message.step_times_fingerprint:
        check_fingerprint(message.step_times_fingerprint)
    return Replica(
        role=role,
        incarnation=message.incarnation,
        address=message.address,
        model=message.model,
        drafter_fingerprint=message.drafter_fingerprint,
        max_context_tokens=message.max_context_tokens,
        step_times_fingerprint=message.step_times_fingerprint,
    )


def _replica_to_pb(replica: Replica) -> pb.Replica:
    return pb.Replica(
        role=_ROLE_NUMBERS[replica.role],
        incarnation=replica.incarnation,
        address=replica.address,
        model=replica.model,
        drafter_fingerprint=replica.drafter_fingerprint,
        max_context_tokens=replica.max_context_tokens,
        step_times_fingerprint=replica.step_times_fingerprint,
    )


def _load(message: pb.Load) -> Load:
    if not 0.0 <= message.busy_share <= 1.0 or not 0.0 <= message.works_per_s < math.inf:
        raise InvalidRequestError(
            "a load needs a busy_share in 0..1 and a finite works_per_s; got "
            f"{message.busy_share} and {message.works_per_s}",
            param="load",
        )
    return Load(
        running=message.running,
        waiting=message.waiting,
        free_pages=message.free_pages,
        total_pages=message.total_pages,
        page_tokens=message.page_tokens,
        max_running=message.max_running,
        max_waiting=message.max_waiting,
        retry_after_s=message.retry_after_ms / 1000,
        busy_share=message.busy_share,
        queued_works=message.queued_works,
        works_per_s=message.works_per_s,
    )


def _load_to_pb(load: Load) -> pb.Load:
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        free_pages=load.free_pages,
        total_pages=load.total_pages,
        page_tokens=load.page_tokens,
        max_running=load.max_running,
        max_waiting=load.max_waiting,
        retry_after_ms=round(load.retry_after_s * 1000),
        busy_share=load.busy_share,
        queued_works=load.queued_works,
        works_per_s=load.works_per_s,
    )


def _bounded(name: str, text: str, limit: int) -> None:
    if not 0 < len(text) <= limit:
        raise InvalidRequestError(
            f"{name} must have 1 to {limit} characters; got {len(text)}", param=name
        )
