"""The verifier's server: streams, refusals, cancellation, and an engine that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from helpers.tiny import run, tiny_drafter, tiny_engine, tiny_target

from dspark.engine import roster
from dspark.engine.runner import EngineRunner
from dspark.engine.verifier import VerifierEngine
from dspark.errors import QueueTimeoutError, UnavailableError
from dspark.pb import verifier_pb2 as pb
from dspark.pb import verifier_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.rpc.status import from_rpc_error
from dspark.services.verifier.servicer import VerifierServicer
from dspark.types import Request, SamplingParams
from dspark.wire.requests import request_to_pb

TARGET = tiny_target()


def request(name: str = "a", max_tokens: int = 40) -> Request:
    return Request(name, (3, 1, 4), SamplingParams(temperature=0.0, max_tokens=max_tokens))


@asynccontextmanager
async def replica(
    engine: VerifierEngine,
) -> AsyncIterator[tuple[Any, EngineRunner, VerifierServicer]]:
    servicer = VerifierServicer("m", asyncio.get_running_loop())
    runner = EngineRunner(
        engine,
        on_results=servicer.deliver,
        on_refused=servicer.refuse,
        on_report=lambda report: None,
        on_failure=servicer.fail,
    )
    servicer.attach(runner)
    runner.start()
    server = ReplicaServer()
    verifier_pb2_grpc.add_VerifierServicer_to_server(servicer, server.server)
    port = await server.start("127.0.0.1", 0, [pb.DESCRIPTOR.services_by_name["Verifier"]])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield verifier_pb2_grpc.VerifierStub(channel), runner, servicer
    await server.stop(0)
    if runner.failure is None:
        await asyncio.to_thread(runner.stop)


@asynccontextmanager
async def serving(engine: VerifierEngine) -> AsyncIterator[tuple[Any, EngineRunner]]:
    async with replica(engine) as (stub, runner, _):
        yield stub, runner


async def collect(stub: Any, one: Request, model: str = "m") -> list[int]:
    tokens: list[int] = []
    async for part in stub.GenerateTokens(request_to_pb(one, model)):
        tokens += part.token_ids
    return tokens


async def code_of(stub: Any, message: pb.GenerateTokensRequest) -> grpc.StatusCode:
    """How a call ends; its parts have to be read for the end to come."""
    try:
        async for _ in stub.GenerateTokens(message):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_streams_are_the_engines_own_output() -> None:
    requests = [request(str(i), 20 + i) for i in range(5)]
    want = run(tiny_engine(TARGET), requests).tokens
    async with serving(tiny_engine(TARGET, tiny_drafter(TARGET))) as (stub, _):
        got = await asyncio.gather(*(collect(stub, one) for one in requests))
    assert got == [want[one.id] for one in requests]


async def test_what_cannot_run_is_refused_by_name() -> None:
    async with serving(tiny_engine(TARGET)) as (stub, _):
        cases = [
            (request_to_pb(request(), "other"), grpc.StatusCode.NOT_FOUND),
            (request_to_pb(request(""), "m"), grpc.StatusCode.INVALID_ARGUMENT),
            (request_to_pb(Request("a", ()), "m"), grpc.StatusCode.INVALID_ARGUMENT),
            (request_to_pb(Request("a", (77,)), "m"), grpc.StatusCode.INVALID_ARGUMENT),
            (request_to_pb(request("a", 10**6), "m"), grpc.StatusCode.INVALID_ARGUMENT),
        ]
        for message, code in cases:
            assert await code_of(stub, message) is code
        assert len(await collect(stub, request())) == 40


async def test_more_than_the_queue_holds_is_refused() -> None:
    engine = tiny_engine(TARGET, max_waiting=1, max_requests=1)
    async with serving(engine) as (_, runner):
        # admission happens in a step: fill the queue faster than one by posting to the inbox
        futures = [runner.add(request(str(i), 200)) for i in range(30)]
        outcomes = await asyncio.gather(
            *(asyncio.wrap_future(f) for f in futures), return_exceptions=True
        )
        refused = [o for o in outcomes if o is not None]
        assert refused
        assert all("wait already" in str(o) for o in refused)
        for i in range(30):
            runner.abort(str(i))


async def test_who_waits_too_long_is_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(roster.time, "monotonic", lambda: now)
    async with serving(tiny_engine(TARGET, max_requests=1, max_queue_s=30.0)) as (stub, runner):
        running = stub.GenerateTokens(request_to_pb(request("runs", 450), "m"))
        assert (await running.read()).token_ids
        waiting = stub.GenerateTokens(request_to_pb(request("waits"), "m"))
        reading = asyncio.create_task(waiting.read())
        while not runner.load[1]:
            await asyncio.to_thread(threading.Event().wait, 0.001)
        now = 31.0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        told = from_rpc_error(caught.value)
        assert isinstance(told, QueueTimeoutError)
        assert 1.0 <= told.retry_after_s <= 60.0
        running.cancel()
        assert len(await collect(stub, request("later"))) == 40


async def test_cancelling_frees_everything() -> None:
    async with serving(tiny_engine(TARGET, tiny_drafter(TARGET))) as (stub, runner):
        calls = [stub.GenerateTokens(request_to_pb(request(str(i), 450), "m")) for i in range(3)]
        for call in calls:
            assert (await call.read()).token_ids
            call.cancel()
        # aborts are done in order before this request is let in
        assert len(await collect(stub, request("last"))) == 40
        while runner.load[0]:  # the last results leave just before their pages are back
            await asyncio.to_thread(threading.Event().wait, 0.001)
        _, _, free, total = runner.load
        assert free == total
        assert len(await collect(stub, request("0"))) == 40  # its name is free again


async def test_an_engine_that_fails_ends_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(TARGET)
    steps = 0
    honest = engine.step

    def breaking() -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("scripted")
        return honest()

    monkeypatch.setattr(engine, "step", breaking)
    async with serving(engine) as (stub, runner):
        assert await code_of(stub, request_to_pb(request(), "m")) is grpc.StatusCode.UNAVAILABLE
        assert isinstance(runner.failure, RuntimeError)
        later = request_to_pb(request("b"), "m")
        assert await code_of(stub, later) is grpc.StatusCode.UNAVAILABLE


async def test_an_engine_that_hangs_is_unwell_and_lets_its_streams_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine(TARGET, max_step_s=1e-9)
    honest, begun, go_on = engine.step, threading.Event(), threading.Event()

    def hanging() -> Any:
        begun.set()
        go_on.wait(30)
        return honest()

    monkeypatch.setattr(engine, "step", hanging)
    async with replica(engine) as (stub, _, servicer):
        servicer.check()
        streaming = asyncio.create_task(code_of(stub, request_to_pb(request(), "m")))
        assert await asyncio.to_thread(begun.wait, 30)
        with pytest.raises(UnavailableError, match="at one step"):
            servicer.check()
        assert await streaming is grpc.StatusCode.UNAVAILABLE
        later = request_to_pb(request("b"), "m")
        assert await code_of(stub, later) is grpc.StatusCode.UNAVAILABLE
        go_on.set()
