"""`dspark plan explain` over real sockets: verifier, scheduler, the command, and the alarm."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from click.testing import Result
from helpers.led_scheduler import led_scheduler
from helpers.tiny import FREE_ROWS, tiny_drafter, tiny_engine, tiny_target
from typer.testing import CliRunner

from dspark.cli.main import app
from dspark.cli.plan_tables import printable
from dspark.config import SchedulerConfig
from dspark.engine.runner import EngineRunner
from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError, ProtocolError
from dspark.pb import scheduler_pb2, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.scheduling.explanation import KEPT_STEPS, SHOWN_REQUESTS
from dspark.services.scheduler.servicer import SchedulerServicer
from dspark.services.scheduler.throughputs import Throughputs
from dspark.services.verifier.servicer import VerifierServicer
from dspark.types import Request, SamplingParams
from dspark.wire.explanation import steps_from_pb, steps_to_pb
from dspark.wire.requests import request_to_pb

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5)
command = CliRunner()


def adaptive_engine() -> VerifierEngine:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), policy="adaptive")
    engine.table = FREE_ROWS
    return engine


@asynccontextmanager
async def verifier(engine: VerifierEngine | None) -> AsyncIterator[tuple[Any, str]]:
    """Its stub and address; without an engine, one that is still starting."""
    servicer = VerifierServicer("m", asyncio.get_running_loop())
    runner = None
    if engine is not None:
        runner = EngineRunner(
            engine,
            on_results=servicer.deliver,
            on_report=lambda report: None,
            on_refused=servicer.refuse,
            on_failure=servicer.fail,
        )
        servicer.attach(runner)
        runner.start()
    server = ReplicaServer()
    verifier_pb2_grpc.add_VerifierServicer_to_server(servicer, server.server)
    names = verifier_pb2.DESCRIPTOR.services_by_name
    port = await server.start("127.0.0.1", 0, [names["Verifier"]])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield verifier_pb2_grpc.VerifierStub(channel), f"127.0.0.1:{port}"
    await server.stop(0)
    if runner is not None:
        await asyncio.to_thread(runner.stop)


@asynccontextmanager
async def scheduler(**verifiers: str) -> AsyncIterator[tuple[Any, str, SchedulerServicer]]:
    """One that knows these, by incarnation and address."""
    async with led_scheduler() as (stub, address, servicer):
        for name, where in verifiers.items():
            replica = scheduler_pb2.Replica(
                role=scheduler_pb2.ROLE_VERIFIER, incarnation=name, address=where, model="m"
            )
            await stub.Heartbeat(scheduler_pb2.HeartbeatRequest(replica=replica))
        yield stub, address, servicer


async def generate(stub: Any, name: str, tokens: int = 30) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
    async for _ in stub.GenerateTokens(request_to_pb(Request(name, PROMPT, sampling), "m")):
        pass


async def explain(*arguments: str) -> Result:
    return await asyncio.to_thread(command.invoke, app, ["plan", "explain", *arguments])


# -- the verifier -----------------------------------------------------------------------------


async def test_a_verifier_tells_what_its_engine_does() -> None:
    engine = adaptive_engine()
    async with verifier(engine) as (stub, _):
        empty = await stub.ExplainSteps(verifier_pb2.ExplainStepsRequest(count=1))
        assert not empty.steps
        await asyncio.gather(generate(stub, "a"), generate(stub, "b"))
        answer = await stub.ExplainSteps(verifier_pb2.ExplainStepsRequest(count=5))
    want = engine.explain(5)
    got = steps_from_pb(answer)
    assert [step.step for step in got] == [step.step for step in want]
    assert [step.basis for step in got] == [step.basis for step in want]
    for one, other in zip(got, want, strict=True):
        assert [r.request_id for r in one.requests] == [r.request_id for r in other.requests]
        assert [r.verified for r in one.requests] == [r.verified for r in other.requests]
        assert one.predicted_per_s == pytest.approx(other.predicted_per_s)
        assert one.measured_per_s == pytest.approx(other.measured_per_s)
    fields = verifier_pb2.RequestExplanation.DESCRIPTOR.fields_by_name
    assert not [name for name in fields if "token" in name or "text" in name]


@pytest.mark.parametrize("count", [0, KEPT_STEPS + 1, 2**32 - 1])
async def test_how_many_steps_is_bounded(count: int) -> None:
    async with verifier(adaptive_engine()) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ExplainSteps(verifier_pb2.ExplainStepsRequest(count=count))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "between 1 and 64" in (caught.value.details() or "")


async def test_a_verifier_that_is_starting_says_so() -> None:
    async with verifier(None) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ExplainSteps(verifier_pb2.ExplainStepsRequest(count=1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def one_step() -> verifier_pb2.ExplainStepsResponse:
    engine = adaptive_engine()
    engine.add(Request("a", PROMPT, SamplingParams(temperature=0.0, max_tokens=30)))
    engine.step()
    engine.step()
    return steps_to_pb(engine.explain(1))


def test_the_message_round_trips() -> None:
    message = one_step()
    assert message.steps[0].HasField("predicted_ms")
    assert steps_to_pb(steps_from_pb(message)) == message


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: setattr(s, "basis", 0), "basis"),
        (lambda s: setattr(s, "basis", 77), "basis"),
        (lambda s: setattr(s, "policy", 0), "policy"),
        (lambda s: setattr(s, "predicted_ms", float("nan")), "finite"),
        (lambda s: setattr(s, "step_ms", -1.0), "finite"),
        (lambda s: s.requests.extend(list(s.requests) * SHOWN_REQUESTS), "requests"),
        (lambda s: setattr(s.requests[0], "request_id", ""), "name"),
        (lambda s: setattr(s.requests[0], "request_id", "x" * 129), "name"),
        (lambda s: s.requests[0].survivals.append(1.5), "survivals"),
        (lambda s: s.requests[0].survivals.extend([0.5] * 64), "survivals"),
        (lambda s: setattr(s.requests[0], "verified", 5), "verified"),
        (lambda s: setattr(s.requests[0], "accepted", 5), "verified"),
    ],
)
def test_steps_outside_the_contract_are_refused(spoil: Callable[[Any], None], match: str) -> None:
    message = one_step()
    spoil(message.steps[0])
    with pytest.raises(ProtocolError, match=match):
        steps_from_pb(message)


def test_more_steps_than_are_kept_are_refused() -> None:
    message = one_step()
    message.steps.extend([message.steps[0]] * KEPT_STEPS)
    with pytest.raises(ProtocolError, match="at most 64"):
        steps_from_pb(message)


# -- the command ------------------------------------------------------------------------------


async def test_the_command_shows_every_verifier() -> None:
    async with (
        verifier(adaptive_engine()) as (one, first),
        verifier(tiny_engine(tiny_target())) as (other, second),  # a target has one thread
        scheduler(v1=first, v2=second) as (_, address, _),
    ):
        await asyncio.gather(generate(one, "chat-1"), generate(other, "chat-2"))
        shown = await explain("--scheduler", address, "--steps", "2")
        named = await explain("--scheduler", address, "--verifier", "v2", "--json")
    assert shown.exit_code == 0, shown.output
    for part in ("v1", "v2", "chat-1", "chat-2", "survivals", "Θ", "own settings", "no block",
                 "there was no drafter to ask"):  # fmt: skip
        assert part in shown.output, part
    (told,) = json.loads(named.stdout)
    assert told["verifier"] == "v2"
    assert told["throughput"] is None
    (step,) = told["steps"]
    assert step["basis"] == "no_drafter"
    assert [r["request_id"] for r in step["requests"]] == ["chat-2"]


async def test_what_was_verified_stands_left_of_the_bar() -> None:
    async with (
        verifier(adaptive_engine()) as (stub, its),
        scheduler(v1=its) as (_, address, _),
    ):
        await generate(stub, "a")
        found = await explain("--scheduler", address, "--steps", "64", "--json")
        shown = await explain("--scheduler", address, "--steps", "64")
    steps = json.loads(found.stdout)[0]["steps"]
    requests = [request for step in steps for request in step["requests"]]
    with_block = [request for request in requests if request["survivals"]]
    assert with_block, "INCONCLUSIVE: nothing was drafted"
    for request in with_block:
        row = [f"{survival:.2f}" for survival in request["survivals"]]
        row.insert(request["verified"], "|")
        assert " ".join(row) in shown.output


async def test_a_verifier_that_does_not_answer_hides_no_other() -> None:
    async with (
        verifier(adaptive_engine()) as (stub, its),
        verifier(None) as (_, starting),
        scheduler(v1=starting, v2=its) as (_, address, _),
    ):
        await generate(stub, "chat")
        result = await explain("--scheduler", address)
    assert result.exit_code == 1
    assert "v1: this verifier is still starting" in result.stderr
    assert "chat" in result.output


async def test_a_verifier_that_is_not_there_is_named_with_those_that_are() -> None:
    async with scheduler(v1="127.0.0.1:1") as (_, address, _):
        result = await explain("--scheduler", address, "--verifier", "v9")
    assert result.exit_code == 1
    assert "no verifier 'v9'; there are: v1" in result.stderr


async def test_no_verifier_and_no_scheduler_are_errors_of_one_line() -> None:
    async with scheduler() as (_, address, _):
        result = await explain("--scheduler", address)
        assert result.exit_code == 1
        assert "knows no verifier" in result.stderr
    result = await explain("--scheduler", address)  # it has gone
    assert result.exit_code == 1
    assert f"no scheduler answers at {address}" in result.stderr
    assert "--scheduler" in result.stderr
    for arguments in ((), ("--scheduler", address, "--prompts", "some.jsonl")):
        result = await explain(*arguments)
        assert result.exit_code == 1
        assert "either --scheduler HOST:PORT or --prompts FILE" in result.stderr


def test_names_from_elsewhere_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2J\r\nb") == "a?[2J??b"


# -- the scheduler ----------------------------------------------------------------------------


def report(step: int, stretch: float = 1.0, **fields: Any) -> scheduler_pb2.StepReport:
    values = {"predicted_tokens": 4.0, "predicted_ms": 10.0, "decoded_tokens": 4,
              "round_ms": 10.0 * stretch, "incarnation": "v1"}  # fmt: skip
    return scheduler_pb2.StepReport(step=step, **{**values, **fields})


async def read_out(call: Any) -> None:
    """How a stream ends is told behind its last plan."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_the_cluster_shows_predicted_against_measured() -> None:
    async with (
        verifier(adaptive_engine()) as (one, its),
        scheduler(v1=its) as (stub, address, servicer),
    ):
        await generate(one, "a")
        call = stub.Coordinate()
        for step in range(1, 101):
            await call.write(report(step, 2.0))
        await call.write(report(101, predicted_tokens=0.0, predicted_ms=0.0))  # no search
        await call.write(report(102, round_ms=0.0))  # the engine rested
        await call.write(report(102))  # the same again
        await call.write(report(103, 2.0, predicted_tokens=float("nan")))  # ends the stream
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_out(call)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        seen = await stub.DescribeCluster(scheduler_pb2.DescribeClusterRequest())
        shown = await explain("--scheduler", address)
    (status,) = seen.throughputs
    assert (status.incarnation, status.steps, status.alarm) == ("v1", 100, True)
    assert status.predicted_tokens_per_s == pytest.approx(400.0)
    assert status.measured_tokens_per_s == pytest.approx(200.0)
    assert status.token_ratio == pytest.approx(1.0)
    assert status.time_ratio == pytest.approx(2.0)
    assert "Θ measured is 0.50 of Θ predicted" in shown.output
    assert "ALARM" in shown.output
    assert servicer.throughputs.of["v1"].alarm


def test_the_alarm_is_logged_once_until_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    throughputs = Throughputs(0.25)
    with caplog.at_level(logging.INFO):
        for step in range(500):
            throughputs.take(report(step, 2.0))
        assert caplog.text.count("brings 0.50 of the throughput") == 1
        for step in range(3000):
            throughputs.take(report(step))
        assert caplog.text.count("are planned by again") == 1
    assert not throughputs.of["v1"].alarm
    throughputs.keep(())
    assert not throughputs.of


async def test_verifiers_that_are_gone_are_forgotten_when_another_comes() -> None:
    async with scheduler(v2="127.0.0.1:1") as (stub, _, servicer):
        call = stub.Coordinate()
        for name in ("v1", "v2", "v3"):  # v2 alone holds a lease
            await call.write(report(1, incarnation=name))
        await call.done_writing()
        await read_out(call)
        assert servicer.throughputs.of.keys() == {"v2", "v3"}


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_cannot_be_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="throughput_alarm"):
        SchedulerConfig(throughput_alarm=threshold)
