"""The scheduler over a real server: leases, placement, plans, and a store that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from helpers.dead_store import DeadStore

from dspark.config import EngineConfig, ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.server import check_serving
from dspark.services.scheduler.plans import RENEW_AFTER_S
from dspark.services.scheduler.service import SchedulerService
from dspark.store import MemoryStore, Store

CONFIG = ServeConfig(engine=EngineConfig(policy="fixed", block_size=3))


@asynccontextmanager
async def scheduler(
    store: Store | None = None,
) -> AsyncIterator[tuple[scheduler_pb2_grpc.SchedulerStub, str]]:
    service = SchedulerService(CONFIG, store or MemoryStore(), clock=lambda: 0.0)
    address = await service.start("127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        yield scheduler_pb2_grpc.SchedulerStub(channel), address
    await service.stop(0)


def replica(role: int, name: str, **fields: str) -> pb.HeartbeatRequest:
    values = {"model": "m", "drafter_fingerprint": "w", **fields}
    return pb.HeartbeatRequest(
        replica=pb.Replica(role=role, incarnation=name, address=f"{name}:1", **values)  # type: ignore[arg-type]
    )


def busy_draft(name: str, **load: float) -> pb.HeartbeatRequest:
    beat = replica(pb.ROLE_DRAFT, name)
    beat.load.CopyFrom(pb.Load(**load))  # type: ignore[arg-type]
    return beat


async def test_heartbeats_introduce_replicas_to_each_other() -> None:
    async with scheduler() as (stub, _):
        alone = await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        assert not alone.drafts
        assert alone.lease_ms == 5000
        await stub.Heartbeat(replica(pb.ROLE_DRAFT, "d"))
        paired = await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        assert [(one.draft.address, one.share) for one in paired.drafts] == [("d:1", 1.0)]
        gateway = await stub.Heartbeat(replica(pb.ROLE_GATEWAY, "g", model=""))
        assert [v.incarnation for v in gateway.verifiers] == ["v"]
        placed = await stub.Place(pb.PlaceRequest(request_id="r", model="m"))
        assert placed.verifier.address == "v:1"
        seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
        assert sorted(s.replica.incarnation for s in seen.replicas) == ["d", "g", "v"]


@pytest.mark.parametrize(
    "bad",
    [
        pb.HeartbeatRequest(),
        replica(pb.ROLE_UNSPECIFIED, "x"),
        replica(77, "x"),
        replica(pb.ROLE_VERIFIER, ""),
        replica(pb.ROLE_VERIFIER, "x" * 1000),
        replica(pb.ROLE_VERIFIER, "x", model=""),
        busy_draft("x", busy_share=1.5),
        busy_draft("x", busy_share=float("nan")),
        busy_draft("x", works_per_s=float("inf")),
        busy_draft("x", works_per_s=-1.0),
    ],
)
async def test_a_heartbeat_that_cannot_be_is_refused(bad: pb.HeartbeatRequest) -> None:
    async with scheduler() as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Heartbeat(bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))


async def test_placing_without_a_verifier_says_which_models_there_are() -> None:
    async with scheduler() as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Place(pb.PlaceRequest(request_id="r", model="m"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "none yet" in (caught.value.details() or "")


async def test_a_plan_is_pushed_at_once_and_reports_are_taken() -> None:
    async with scheduler() as (stub, _):
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        call = stub.Coordinate()
        plan = await call.read()
        assert plan.policy == pb.VERIFICATION_POLICY_FIXED
        assert plan.block_size == 3
        await call.write(pb.StepReport(incarnation="v", step=7))

        async def reported() -> bool:
            seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
            return [r.step for r in seen.reports] == [7]

        for _ in range(1000):  # each look is a round trip, so this is no spin
            if await reported():
                break
        assert await reported()
        call.cancel()


async def test_what_plans_say_changes_and_verifiers_are_told_at_once() -> None:
    service = SchedulerService(CONFIG, MemoryStore(), clock=lambda: 0.0)
    address = await service.start("127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        call = scheduler_pb2_grpc.SchedulerStub(channel).Coordinate()
        first = await call.read()
        service.reconfigure(EngineConfig(policy="off", block_size=2, draft_by_request=True))
        async with asyncio.timeout(RENEW_AFTER_S / 2):
            plan = await call.read()
        assert plan.epoch > first.epoch
        assert plan.policy == pb.VERIFICATION_POLICY_OFF
        assert (plan.block_size, plan.draft_by_request) == (2, True)
        call.cancel()
    await service.stop(0)


async def quota(stub: scheduler_pb2_grpc.SchedulerStub, step_ms: float = 80.0) -> int:
    """What the plan that answers a verifier's report allows."""
    call = stub.Coordinate()
    await call.read()
    await call.write(pb.StepReport(incarnation="v", step=1, step_ms=step_ms))
    plan = await call.read()
    call.cancel()
    return int(plan.max_blocks)


TIRED = {"busy_share": 1.0, "queued_works": 9, "works_per_s": 100}


async def test_a_quota_of_blocks_is_sent_while_the_draft_replica_is_saturated() -> None:
    async with scheduler() as (stub, _):
        for name in ("v", "w"):
            await stub.Heartbeat(replica(pb.ROLE_VERIFIER, name))
        assert await quota(stub) == 0
        await stub.Heartbeat(busy_draft("d", **TIRED))
        # In a step of 80 ms, at 100 a second, for the other verifier.
        assert await quota(stub) == 8
        await stub.Heartbeat(busy_draft("d", busy_share=0.3, works_per_s=100))
        assert await quota(stub) == 0
        seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
        (load,) = [s.load for s in seen.replicas if s.replica.role == pb.ROLE_DRAFT]
        assert load == busy_draft("d", busy_share=0.3, works_per_s=100).load


async def test_one_draft_replica_with_room_lifts_the_quota() -> None:
    async with scheduler() as (stub, _):
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        await stub.Heartbeat(busy_draft("d", **TIRED))
        await stub.Heartbeat(busy_draft("e", busy_share=0.1, works_per_s=100))
        assert await quota(stub) == 0
        await stub.Heartbeat(busy_draft("e", **TIRED))
        assert await quota(stub) == 16


@pytest.mark.parametrize("step_ms", [float("nan"), float("inf"), 0.0, -5.0, 1e30])
async def test_a_step_time_that_cannot_be_gives_no_quota(step_ms: float) -> None:
    async with scheduler() as (stub, _):
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        await stub.Heartbeat(busy_draft("d", **TIRED))
        assert await quota(stub, step_ms) == 0


async def test_a_report_without_a_name_ends_its_own_stream_only() -> None:
    async with scheduler() as (stub, _):
        good, bad = stub.Coordinate(), stub.Coordinate()
        await asyncio.gather(good.read(), bad.read())
        await bad.write(pb.StepReport())
        assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
        await good.write(pb.StepReport(incarnation="v"))
        assert not good.done()
        good.cancel()


async def test_streams_that_are_refused_while_their_first_plan_goes_out_end() -> None:
    async with scheduler() as (stub, _):

        async def refused() -> grpc.StatusCode:
            call = stub.Coordinate()
            await call.write(pb.StepReport())
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code()
            return await call.code()

        async with asyncio.timeout(60):
            codes = await asyncio.gather(*(refused() for _ in range(200)))
        assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}


async def test_a_verifier_that_says_its_name_and_leaves_is_let_go() -> None:
    """What wakes the pushing of plans may come together with its end."""
    async with scheduler() as (stub, _):
        call = stub.Coordinate()
        await call.write(pb.StepReport(incarnation="v"))
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await call.code() is grpc.StatusCode.OK


async def test_a_restarted_scheduler_knows_the_cluster() -> None:
    store = MemoryStore()
    async with scheduler(store) as (stub, _):
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
    async with scheduler(store) as (stub, _):
        placed = await stub.Place(pb.PlaceRequest(request_id="r", model="m"))
        assert placed.verifier.incarnation == "v"


async def test_what_the_store_holds_of_replicas_is_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    await store.put("registry/a", b"\xff\xff\xff")
    await store.put("registry/b", replica(pb.ROLE_VERIFIER, "x" * 1000).SerializeToString())
    await store.put("registry/v", replica(pb.ROLE_VERIFIER, "v").SerializeToString())
    async with scheduler(store) as (stub, _):
        placed = await stub.Place(pb.PlaceRequest(request_id="r", model="m"))
        assert placed.verifier.incarnation == "v"
    for key in ("registry/a", "registry/b"):
        assert any(f" as {key}: " in r.getMessage() for r in caplog.records)


async def test_a_dead_store_changes_nothing() -> None:
    async with scheduler(DeadStore()) as (stub, _):
        await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        placed = await stub.Place(pb.PlaceRequest(request_id="r", model="m"))
        assert placed.verifier.incarnation == "v"


async def test_health_and_reflection_answer() -> None:
    async with scheduler() as (_, address), grpc.aio.insecure_channel(address) as channel:
        await check_serving(address)
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="dspark.v1.Scheduler")
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = [s.name for s in (await call.read()).list_services_response.service]
        assert "dspark.v1.Scheduler" in names
        call.cancel()
