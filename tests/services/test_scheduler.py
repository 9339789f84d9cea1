"""The scheduler over a real server: leases, placement, plans, and a store that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dspark.config import EngineConfig, ServeConfig
from dspark.errors import UnavailableError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.server import ReplicaServer, check_serving
from dspark.scheduling.cluster import Cluster
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.store import MemoryStore, Store

CONFIG = ServeConfig(engine=EngineConfig(policy="fixed", block_size=3))


@asynccontextmanager
async def scheduler(
    store: Store | None = None,
) -> AsyncIterator[tuple[scheduler_pb2_grpc.SchedulerStub, str]]:
    servicer = SchedulerServicer(CONFIG, Cluster(5.0, lambda: 0.0), store or MemoryStore())
    await servicer.restore()
    server = ReplicaServer()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.server)
    port = await server.start("127.0.0.1", 0, [pb.DESCRIPTOR.services_by_name["Scheduler"]])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield scheduler_pb2_grpc.SchedulerStub(channel), f"127.0.0.1:{port}"
    await server.stop(0)


def replica(role: int, name: str, **fields: str) -> pb.HeartbeatRequest:
    values = {"model": "m", "drafter_fingerprint": "w", **fields}
    return pb.HeartbeatRequest(
        replica=pb.Replica(role=role, incarnation=name, address=f"{name}:1", **values)  # type: ignore[arg-type]
    )


async def test_heartbeats_introduce_replicas_to_each_other() -> None:
    async with scheduler() as (stub, _):
        alone = await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        assert not alone.HasField("draft")
        assert alone.lease_ms == 5000
        await stub.Heartbeat(replica(pb.ROLE_DRAFT, "d"))
        paired = await stub.Heartbeat(replica(pb.ROLE_VERIFIER, "v"))
        assert paired.draft.address == "d:1"
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
        assert (plan.block_size, plan.epoch) == (3, 1)
        await call.write(pb.StepReport(incarnation="v", step=7))

        async def reported() -> bool:
            seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
            return [r.step for r in seen.reports] == [7]

        for _ in range(1000):  # each look is a round trip, so this is no spin
            if await reported():
                break
        assert await reported()
        call.cancel()


async def test_a_report_without_a_name_ends_its_own_stream_only() -> None:
    async with scheduler() as (stub, _):
        good, bad = stub.Coordinate(), stub.Coordinate()
        await asyncio.gather(good.read(), bad.read())
        await bad.write(pb.StepReport())
        assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
        await good.write(pb.StepReport(incarnation="v"))
        assert not good.done()
        good.cancel()


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


class DeadStore(MemoryStore):
    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        raise UnavailableError("scripted")

    async def list(self, prefix: str) -> dict[str, bytes]:
        raise UnavailableError("scripted")


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
