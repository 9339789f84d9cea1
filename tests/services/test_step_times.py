"""Step times from one verifier to the next, through a real scheduler and its store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from helpers.dead_store import DeadStore

from dspark.config import ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc import step_times as client
from dspark.rpc.step_times import SharedStepTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.services.scheduler import step_times as kept
from dspark.services.scheduler.service import SchedulerService
from dspark.store import MemoryStore, Store
from dspark.wire.step_times import step_times_to_pb

NAME = "0123456789abcdef"
TABLE = StepTimeTable(
    (1, 2), (1, 2), (8, 64), (((1.0, 2.0), (3.0, 4.0)),) * 2, padded=(4,), fingerprint=NAME
)


@asynccontextmanager
async def scheduler(store: Store) -> AsyncIterator[tuple[scheduler_pb2_grpc.SchedulerStub, str]]:
    service = SchedulerService(ServeConfig(), store, clock=lambda: 0.0)
    address = await service.start("127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        yield scheduler_pb2_grpc.SchedulerStub(channel), address
    await service.stop(0)


def shared(address: str) -> SharedStepTimes:
    async def locate() -> str:
        return address

    return SharedStepTimes(locate)


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_a_table_outlives_the_verifier_and_the_scheduler() -> None:
    store = MemoryStore()
    async with scheduler(store) as (_, address):
        verifier = shared(address)
        assert await asyncio.to_thread(verifier.get, NAME) is None
        await asyncio.to_thread(verifier.put, TABLE)
    async with scheduler(store) as (_, address):
        assert await asyncio.to_thread(shared(address).get, NAME) == TABLE
        assert await asyncio.to_thread(shared(address).get, "f" * 16) is None


async def test_what_is_no_table_is_refused() -> None:
    good = step_times_to_pb(TABLE)
    async with scheduler(MemoryStore()) as (stub, _):
        for name in ("", "x" * 16, "../etc/passwd", "0" * 65):
            asked = stub.GetStepTimes(pb.GetStepTimesRequest(fingerprint=name))
            assert await code_of(asked) is grpc.StatusCode.INVALID_ARGUMENT
            bad = pb.StepTimeTable()
            bad.CopyFrom(good)
            bad.fingerprint = name
            told = stub.PutStepTimes(pb.PutStepTimesRequest(table=bad))
            assert await code_of(told) is grpc.StatusCode.INVALID_ARGUMENT
        bad = pb.StepTimeTable()
        bad.CopyFrom(good)
        bad.step_ms[0] = 100.0
        told = stub.PutStepTimes(pb.PutStepTimesRequest(table=bad))
        assert await code_of(told) is grpc.StatusCode.FAILED_PRECONDITION
        asked = stub.GetStepTimes(pb.GetStepTimesRequest(fingerprint=NAME))
        assert await code_of(asked) is grpc.StatusCode.NOT_FOUND
        await stub.PutStepTimes(pb.PutStepTimesRequest(table=good))


async def test_tables_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_TABLES", 2)
    async with scheduler(MemoryStore()) as (stub, _):
        message = step_times_to_pb(TABLE)
        for digit in "ab":
            message.fingerprint = digit * 16
            await stub.PutStepTimes(pb.PutStepTimesRequest(table=message))
        await stub.PutStepTimes(pb.PutStepTimesRequest(table=message))  # replaces
        message.fingerprint = "c" * 16
        told = stub.PutStepTimes(pb.PutStepTimesRequest(table=message))
        assert await code_of(told) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("value", [b"", b"{}", TABLE.to_json().replace("0123", "3210").encode()])
async def test_what_the_store_holds_damaged_is_none(
    value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    await store.put(f"step_times/{NAME}", value)
    async with scheduler(store) as (_, address):
        assert await asyncio.to_thread(shared(address).get, NAME) is None
        assert "ignored what the store holds" in caplog.text
        await asyncio.to_thread(shared(address).put, TABLE)
        assert await asyncio.to_thread(shared(address).get, NAME) == TABLE


async def test_without_a_store_verifiers_measure_for_themselves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scheduler(DeadStore()) as (_, address):
        verifier = shared(address)
        assert await asyncio.to_thread(verifier.get, NAME) is None
        await asyncio.to_thread(verifier.put, TABLE)
    assert caplog.text.count("no step times are shared") == 1


async def test_a_scheduler_that_is_silent_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Looked for in vain, then never again."""
    monkeypatch.setattr(client, "_PATIENCE_S", 0.05)
    searches = 0

    async def locate() -> str:
        nonlocal searches
        searches += 1
        await asyncio.Event().wait()
        raise AssertionError("never")

    verifier = SharedStepTimes(locate)
    with caplog.at_level(logging.WARNING):
        assert await asyncio.to_thread(verifier.get, NAME) is None
        await asyncio.to_thread(verifier.put, TABLE)
    assert searches == 1
    assert "TimeoutError" in caplog.text


async def test_another_table_than_was_asked_for_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Wrong(scheduler_pb2_grpc.SchedulerServicer):
        async def GetStepTimes(  # noqa: N802 - gRPC's name
            self, request: pb.GetStepTimesRequest, context: object
        ) -> pb.GetStepTimesResponse:
            return pb.GetStepTimesResponse(table=step_times_to_pb(TABLE))

    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(Wrong(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await asyncio.to_thread(shared(f"127.0.0.1:{port}").get, "e" * 16) is None
    assert "of no use" in caplog.text
    await server.stop(None)
