"""Placement over a real scheduler: throughput, prefixes, and queues that are full."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from helpers.led_scheduler import led_scheduler
from helpers.tables import flat_table

from dspark.errors import OverloadedError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.status import from_rpc_error
from dspark.store import MemoryStore, Store
from dspark.wire.step_times import step_times_to_pb

FAST, SLOW = "a" * 16, "b" * 16
ROWS = {FAST: ((10.0, 11.0), (11.0, 12.0)), SLOW: ((30.0, 60.0), (200.0, 400.0))}
ROOM = {"page_tokens": 16, "free_pages": 900, "total_pages": 1000, "max_running": 8}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def scheduler(
    store: Store | None = None, clock: Clock | None = None
) -> AsyncIterator[scheduler_pb2_grpc.SchedulerStub]:
    async with led_scheduler(store, clock or Clock()) as (stub, _, _):
        yield stub


async def beat(
    stub: Any, name: str, fingerprint: str = "", context_tokens: int = 0, **load: int
) -> None:
    await stub.Heartbeat(
        pb.HeartbeatRequest(
            replica=pb.Replica(
                role=pb.ROLE_VERIFIER,
                incarnation=name,
                address=f"{name}:1",
                model="m",
                max_context_tokens=context_tokens,
                step_times_fingerprint=fingerprint,
            ),
            load=pb.Load(**{**ROOM, **load}),
        )
    )


async def place(stub: Any, name: str, *tokens: int, **fields: Any) -> str:
    text = fields.pop("text", "")
    prefixes = [pb.Prefix(tokens=n, hash=1000 * n + len(text)) for n in tokens]
    request = pb.PlaceRequest(
        request_id=name, model="m", prompt_tokens=100, max_tokens=50, prefixes=prefixes, **fields
    )
    placed: pb.PlaceResponse = await stub.Place(request)
    return placed.verifier.incarnation


async def report(stub: Any, name: str) -> None:
    """One step of two requests, and come back once it is known."""
    call = stub.Coordinate()
    await call.write(
        pb.StepReport(
            incarnation=name, step=1, step_ms=12.0, decode_requests=2, tokens=4, committed=3,
            free_pages=900, total_pages=1000,
        )
    )  # fmt: skip
    known: list[str] = []
    while name not in known:
        seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
        known = [r.incarnation for r in seen.reports]
    call.cancel()


async def keep_tables(stub: Any) -> None:
    for name, step_ms in ROWS.items():
        table = step_times_to_pb(flat_table((1, 8), (1, 5), step_ms))
        table.fingerprint = name
        await stub.PutStepTimes(pb.PutStepTimesRequest(table=table))


async def test_requests_go_where_they_gain_most() -> None:
    store = MemoryStore()
    async with scheduler(store) as stub:
        await keep_tables(stub)
    async with scheduler(store) as stub:  # a new one learns tables from the store
        for name, fingerprint in (("fast", FAST), ("slow", SLOW)):
            await beat(stub, name, fingerprint, running=2)
            await report(stub, name)
        await beat(stub, "slow", SLOW, running=1)
        await beat(stub, "fast", FAST, running=2)
        assert [await place(stub, str(i)) for i in range(6)] == ["fast"] * 6
        assert await place(stub, "late") == "slow"  # all of the other's slots are taken


async def test_without_tables_the_least_busy_is_chosen() -> None:
    async with scheduler() as stub:
        await beat(stub, "fast", FAST, running=2)
        await beat(stub, "slow", SLOW, running=1)
        await report(stub, "fast")
        assert await place(stub, "r") == "slow"


async def test_prompts_that_begin_alike_go_to_the_same_verifier() -> None:
    async with scheduler() as stub:
        await beat(stub, "a", running=1)
        await beat(stub, "b")
        assert await place(stub, "1", 16, 32, text="one") == "b"
        assert await place(stub, "2", 16, 32, 64, text="one") == "b"
        assert await place(stub, "3", 16, text="other") == "a"
        await beat(stub, "a")
        await beat(stub, "b")
        assert await place(stub, "4", 16, 32, text="one") == "b"
        await beat(stub, "b", running=3)  # too far from balance
        assert await place(stub, "5", 16, 32, text="one") == "a"
        await beat(stub, "b", running=0)
        assert await place(stub, "6", 16, 32, text="one") == "a"  # which had it last


async def refusal(stub: Any, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await place(stub, "refused", **fields)
    return caught.value


async def test_full_queues_are_said_at_once_with_the_least_wait() -> None:
    clock = Clock()
    full = {"running": 8, "waiting": 4, "max_waiting": 4}
    async with scheduler(clock=clock) as stub:
        await beat(stub, "a", **full, retry_after_ms=9000)
        await beat(stub, "b", **full, retry_after_ms=7000)
        error = await refusal(stub)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        told = from_rpc_error(error)
        assert isinstance(told, OverloadedError)
        assert told.retry_after_s == 7.0
        assert "all 2 verifiers" in str(told)
        # One that was let in before is placed all the same.
        assert await place(stub, "moved", let_in=True, avoid_incarnations=["a"]) in ("a", "b")
        # Old news is no reason to refuse: verifiers speak for themselves.
        clock.now += 3.0
        assert await place(stub, "later") in ("a", "b")
        await beat(stub, "a", **full)
        await beat(stub, "b", running=8, waiting=3, max_waiting=4)
        assert await place(stub, "next") == "b"
        await beat(stub, "b", **full, retry_after_ms=10**6)
        told = from_rpc_error(await refusal(stub))
        assert isinstance(told, OverloadedError)
        assert told.retry_after_s == 1.0


async def test_a_request_goes_where_it_fits() -> None:
    full = {"running": 8, "waiting": 4, "max_waiting": 4}
    async with scheduler() as stub:
        await beat(stub, "small", context_tokens=149)
        error = await refusal(stub, let_in=True)
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # one that it fits may come back
        assert "150 positions" in (error.details() or "")
        await beat(stub, "exact", context_tokens=150, running=7)
        for name in ("1", "2"):
            assert await place(stub, name, avoid_incarnations=["exact"]) == "exact"
        await beat(stub, "exact", context_tokens=150, **full)
        assert (await refusal(stub)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await place(stub, "moved", let_in=True) == "exact"
        await beat(stub, "untold")
        assert await place(stub, "3") == "untold"


async def test_what_cannot_be_is_refused() -> None:
    async with scheduler() as stub:
        await beat(stub, "a")
        for prefixes in (
            [pb.Prefix(tokens=1, hash=i) for i in range(17)],
            [pb.Prefix(tokens=101, hash=1)],
        ):
            request = pb.PlaceRequest(
                request_id="r", model="m", prompt_tokens=100, prefixes=prefixes
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Place(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "prefix" in (caught.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await beat(stub, "b", "not a fingerprint")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await place(stub, "r") == "a"


@pytest.mark.parametrize(
    "wrong",
    [
        pb.StepReport(step_ms=float("nan"), decode_requests=2, tokens=2, committed=2),
        pb.StepReport(step_ms=1e30, draft_wait_ms=-1e30, decode_requests=1, tokens=1, committed=1),
        pb.StepReport(step_ms=1.0, decode_requests=1, tokens=1, prefill_tokens=9, committed=1),
        pb.StepReport(step_ms=1.0, decode_requests=2**31, tokens=1, committed=2**31),
        pb.StepReport(step_ms=11.0, decode_requests=2, tokens=4, committed=3, free_pages=2**31),
    ],
)
async def test_a_report_that_cannot_be_harms_no_placement(wrong: pb.StepReport) -> None:
    async with scheduler() as stub:
        await keep_tables(stub)
        for name in ("a", "b"):
            await beat(stub, name, FAST)
            await report(stub, name)
        wrong.incarnation, wrong.step = "a", 2
        call = stub.Coordinate()
        await call.write(wrong)
        seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
        while {r.incarnation: r.step for r in seen.reports}["a"] != 2:
            seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
        call.cancel()
        for name in ("a", "b"):
            await beat(stub, name, FAST)
        assert {await place(stub, str(i)) for i in range(4)} == {"a", "b"}
