"""Recalibration from reports to tables in use, over a real server and a real coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from helpers.tiny import ScriptedLink, run, tiny_drafter, tiny_engine, tiny_target
from helpers.traffic import alike, outcomes, traffic

from dspark.config import EngineConfig, ServeConfig
from dspark.engine.runner import EngineRunner
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.scheduling.calibration import CalibrationInUse, CalibrationTable, survival_error
from dspark.scheduling.recalibration import FIRST_BLOCKS
from dspark.scheduling.survival import survival
from dspark.services.scheduler.service import SchedulerService
from dspark.services.verifier.coordination import Coordinator
from dspark.store import MemoryStore
from dspark.types import RAW_SCALES, BlockOutcomes, DraftWork, Request, SamplingParams, StepReport
from dspark.wire.bounds import MAX_OUTCOMES
from dspark.wire.plans import table_to_pb

BOUND_S = 30.0
SIZE = 3
BATCH = 128  # blocks in a report
SURE, TIMID = (2.0, 3.0, 2.0), (0.5, 0.5, 0.5)
KEY = "calibration/w/m"


def step_report(step: int, told: BlockOutcomes | None = None, epoch: int = 0) -> StepReport:
    nothing = (0,) * SIZE
    return StepReport(
        step, 1.0, 0.0, 1, 0, 1, 0, 0, nothing, nothing, 1, 1, 1, epoch, 0, outcomes=told
    )


class Verifier:
    """The verifier's end: a coordinator, and the tables that it lets in."""

    def __init__(self, channel: grpc.aio.Channel, name: str, block_size: int = SIZE) -> None:
        self.name, self.stub = name, scheduler_pb2_grpc.SchedulerStub(channel)
        self.used = CalibrationInUse(block_size, "w")
        self.steps = 0
        self.heard = asyncio.Event()
        self.coordinator = Coordinator(name, lambda: channel, lambda plan: None, self._hear)

    def _hear(self, table: CalibrationTable) -> None:
        self.used.offer(table)
        self.heard.set()

    async def register(self, fingerprint: str = "w") -> None:
        replica = pb.Replica(
            role=pb.ROLE_VERIFIER,
            incarnation=self.name,
            address=f"{self.name}:1",
            model="m",
            drafter_fingerprint=fingerprint,
        )
        await self.stub.Heartbeat(pb.HeartbeatRequest(replica=replica))

    def tell(self, count: int, truth: tuple[float, ...], seed: int = 0) -> None:
        """Reports of `count` blocks."""
        told = outcomes(count, truth, seed=seed, in_use=self.used.scales)
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            self.steps += 1
            self.coordinator.report(
                step_report(
                    self.steps,
                    BlockOutcomes(
                        told.confidences[part],
                        told.verified[part],
                        told.accepted[part],
                        told.greedy[part],
                        told.scales,
                    ),
                    self.used.epoch,
                )
            )

    async def reaches(self, epoch: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while self.used.epoch < epoch:
                self.heard.clear()
                await self.heard.wait()

    async def calibrations(self) -> list[pb.CalibrationStatus]:
        seen = await self.stub.DescribeCluster(pb.DescribeClusterRequest())
        return list(seen.calibrations)


@asynccontextmanager
async def scheduler(store: MemoryStore | None = None) -> AsyncIterator[grpc.aio.Channel]:
    config = ServeConfig(engine=EngineConfig(policy="fixed"))
    service = SchedulerService(config, store or MemoryStore(), clock=lambda: 0.0)
    async with grpc.aio.insecure_channel(await service.start("127.0.0.1")) as channel:
        yield channel
    await service.stop(0)


@asynccontextmanager
async def verifier(
    channel: grpc.aio.Channel, name: str = "v", block_size: int = SIZE, fingerprint: str = "w"
) -> AsyncIterator[Verifier]:
    made = Verifier(channel, name, block_size)
    await made.register(fingerprint)
    made.coordinator.start()
    yield made
    await made.coordinator.stop()


async def test_reported_traffic_brings_a_scale_that_mend_the_error() -> None:
    async with scheduler() as channel, verifier(channel) as one, verifier(channel, "u") as other:
        one.tell(FIRST_BLOCKS // 2, SURE)
        other.tell(FIRST_BLOCKS // 2, SURE, seed=1)
        await one.reaches(1)
        await other.reaches(1)  # of the same drafter
        assert one.used.scales == other.used.scales
        raw, stood = traffic(4000, SURE, seed=9)
        whole = np.full(len(stood), SIZE)
        blocks = raw, whole, stood, np.zeros(len(stood), dtype=np.bool_)
        before, after = (survival_error(*blocks, s) for s in (RAW_SCALES, one.used.scales))
        assert after < before / 2
        (status,) = await one.calibrations()
        assert (status.model, status.drafter_fingerprint) == ("m", "w")
        assert (status.table.epoch, status.window_blocks) == (1, FIRST_BLOCKS)
        assert status.error < status.raw_error / 2


async def test_a_verifier_of_another_drafter_gets_none_and_lets_none_in() -> None:
    async with scheduler() as channel, verifier(channel) as one:
        one.tell(FIRST_BLOCKS, SURE)
        await one.reaches(1)
        async with (
            verifier(channel, "other", fingerprint="x") as other,
            verifier(channel, "longer", block_size=SIZE + 1) as longer,
        ):
            # Registered as w, with another block size: it is sent the table, and refuses it.
            await asyncio.wait_for(longer.heard.wait(), BOUND_S)
            assert longer.used.refused > 0
            assert longer.used.scales == RAW_SCALES
            longer.tell(128, (1.0,) * (SIZE + 1))
            other.tell(128, SURE)

            async def statuses() -> dict[str, pb.CalibrationStatus]:
                return {s.drafter_fingerprint: s for s in await one.calibrations()}

            async with asyncio.timeout(BOUND_S):
                while "x" not in (seen := await statuses()) or not seen["w"].misfits:
                    pass
            assert not seen["x"].HasField("table")
            assert seen["w"].window_blocks == FIRST_BLOCKS
            assert other.used.scales == RAW_SCALES
            assert not other.heard.is_set()


async def test_a_table_outlives_the_scheduler_and_its_epochs_go_on() -> None:
    store = MemoryStore()
    async with scheduler(store) as channel, verifier(channel) as one:
        one.tell(FIRST_BLOCKS, SURE)
        await one.reaches(1)
        first = one.used.scales
        async with asyncio.timeout(BOUND_S):
            while not await store.list(KEY):
                await one.calibrations()
    async with scheduler(store) as channel, verifier(channel) as one:
        await one.reaches(1)  # at once: nothing was reported yet
        assert one.used.scales == first
        one.tell(FIRST_BLOCKS, TIMID)
        await one.reaches(2)
        assert one.used.scales.sampled.temperatures == pytest.approx(TIMID, rel=0.5)
    used = one.used
    async with scheduler() as channel, verifier(channel) as one:  # the store is lost as well
        one.used = used
        one.tell(FIRST_BLOCKS, SURE)
        await one.reaches(3)


async def test_what_the_store_holds_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    table = CalibrationTable(alike(SURE), SIZE, "w", 1000, epoch=3)
    bad = {
        KEY: b"{",
        "calibration/w/n": table.to_json().replace("3.0", "NaN").encode(),
        "calibration/w/o": b"\xff" * 100,
        "calibration/x/m": table.to_json().encode(),
        "calibration/w/": table.to_json().encode(),
        "calibration/w/p": b" " * 100_000,
    }
    for key, value in bad.items():
        await store.put(key, value)
    await store.put("calibration/w/a/b", table.to_json().encode())  # models have such names
    async with scheduler(store) as channel, verifier(channel) as one:
        assert [s.model for s in await one.calibrations()] == ["a/b"]
        for key in bad:
            assert any(f" as {key}: " in r.getMessage() for r in caplog.records)
        one.tell(FIRST_BLOCKS, SURE)
        await one.reaches(1)


async def test_outcomes_that_cannot_be_end_their_own_stream_only() -> None:
    async with scheduler() as channel, verifier(channel) as one:
        call = one.stub.Coordinate()
        await call.read()
        spoilt = pb.BlockOutcomes(block_size=3, verified=b"\1", accepted=b"\2")
        await call.write(pb.StepReport(incarnation="v", step=1, outcomes=spoilt))
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        one.tell(FIRST_BLOCKS, SURE)
        await one.reaches(1)


async def test_a_report_that_comes_twice_counts_once() -> None:
    async with scheduler() as channel, verifier(channel) as one:
        told = step_report(1, outcomes(100, SURE))
        for report in (told, told, step_report(2, outcomes(100, SURE)), step_report(3)):
            one.coordinator.report(report)
        async with asyncio.timeout(BOUND_S):
            while [s.window_blocks for s in await one.calibrations()] != [200]:
                pass
            while True:
                seen = await one.stub.DescribeCluster(pb.DescribeClusterRequest())
                if [r.step for r in seen.reports] == [3]:
                    break
        assert [s.window_blocks for s in seen.calibrations] == [200]


async def test_a_bad_table_does_not_cost_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    plans: list[object] = []
    tables: list[CalibrationTable] = []
    good = CalibrationTable(alike(SURE), SIZE, "w", 1000)

    class Scripted(scheduler_pb2_grpc.SchedulerServicer):
        async def Coordinate(  # noqa: N802
            self, request_iterator: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[pb.StepPlan]:
            bad = table_to_pb(good)
            bad.sampled_scale.temperatures[0] = -1.0
            for epoch, table in enumerate((bad, table_to_pb(good)), 1):
                yield pb.StepPlan(
                    epoch=epoch, policy=pb.VERIFICATION_POLICY_FIXED, calibration=table
                )

    server = ReplicaServer()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(Scripted(), server.server)
    port = await server.start("127.0.0.1", 0, [pb.DESCRIPTOR.services_by_name["Scheduler"]])
    arrived = asyncio.Event()

    def hear(table: CalibrationTable) -> None:
        tables.append(table)
        arrived.set()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        coordinator = Coordinator("v", lambda: channel, plans.append, hear)
        coordinator.start()
        await asyncio.wait_for(arrived.wait(), BOUND_S)
        await coordinator.stop()
    await server.stop(0)
    assert (len(plans), tables) == (2, [good])
    assert "temperatures" in caplog.text


async def test_what_a_deposed_scheduler_sends_is_refused_with_its_table() -> None:
    def told(epoch: int, table_epoch: int) -> pb.StepPlan:
        table = CalibrationTable(alike(SURE), SIZE, "w", 1000, table_epoch)
        policy = pb.VERIFICATION_POLICY_FIXED
        return pb.StepPlan(epoch=epoch, policy=policy, calibration=table_to_pb(table))

    first, second = 7 << 32, 8 << 32
    streams = [
        [told(first + 1, 1), told(first + 2, 2)],
        # The next leader was not told of table 2, and learns of it from the reports.
        [told(second + 1, 1), told(second + 2, 3)],
        [told(first + 3, 9), told(first + 4, 9)],  # the old one, which does not know yet
        [told(second + 2, 9), told(second + 3, 3)],  # the first of them twice
    ]
    reports: list[pb.StepReport] = []
    reported = asyncio.Event()

    class Scripted(scheduler_pb2_grpc.SchedulerServicer):
        async def Coordinate(  # noqa: N802
            self, request_iterator: AsyncIterator[pb.StepReport], context: object
        ) -> AsyncIterator[pb.StepPlan]:
            for plan in streams.pop(0):
                yield plan
            if streams:
                return
            async for report in request_iterator:
                if report.step:
                    reports.append(report)
                    reported.set()

    epochs: list[int] = []
    used = CalibrationInUse(SIZE, "w")
    in_use: list[int] = []
    last = asyncio.Event()

    def hear(table: CalibrationTable) -> None:
        used.offer(table)
        in_use.append(used.epoch)
        if not streams and len(epochs) == 5:
            last.set()

    server = ReplicaServer()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(Scripted(), server.server)
    port = await server.start("127.0.0.1", 0, [pb.DESCRIPTOR.services_by_name["Scheduler"]])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        coordinator = Coordinator(
            "v", lambda: channel, lambda plan: epochs.append(plan.epoch), hear
        )
        coordinator.start()
        await asyncio.wait_for(last.wait(), BOUND_S)
        coordinator.report(step_report(1))
        await asyncio.wait_for(reported.wait(), BOUND_S)
        await coordinator.stop()
    await server.stop(0)
    assert epochs == [first + 1, first + 2, second + 1, second + 2, second + 3]
    assert in_use == [1, 2, 2, 3, 3]
    assert [report.plans_refused for report in reports] == [3]


class Boastful(ScriptedLink):
    """Always as good as certain of itself."""

    def submit(self, works: Sequence[DraftWork]) -> None:
        super().submit(works)
        self._ready = [
            replace(p, confidences=np.full_like(p.confidences, 0.95)) for p in self._ready
        ]


async def test_an_engines_own_blocks_calibrate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.scheduling.outcomes.MOST_BLOCKS", MAX_OUTCOMES)  # soon enough
    target = tiny_target()
    drafter = tiny_drafter(target)
    greedy = SamplingParams(temperature=0.0, max_tokens=300)
    settings = {"max_requests": 16, "cache_tokens": 16384}
    prompts = {f"{turn}/{i}": (3, 1, 4, i) for turn in range(3) for i in range(16)}
    once = [Request(str(i), prompts[f"0/{i}"], greedy) for i in range(16)]
    plain = run(tiny_engine(target, **settings), once).tokens
    known = {name: [*prompt, *plain[str(prompt[-1])]] for name, prompt in prompts.items()}
    link = Boastful(known, target.vocab_size, wrong=0.4)
    engine = tiny_engine(target, drafter, link=link, **settings)
    engine.calibration = CalibrationInUse(drafter.config.block_size, "w")
    heard = asyncio.Event()

    def hear(table: CalibrationTable) -> None:
        runner.set_calibration(table)
        heard.set()

    async with scheduler() as channel:
        await Verifier(channel, "v").register()
        coordinator = Coordinator("v", lambda: channel, lambda plan: None, hear)
        runner = EngineRunner(
            engine,
            on_results=lambda results: None,
            on_refused=lambda refusals: None,
            on_report=coordinator.report,
            on_failure=lambda error: None,
        )
        coordinator.start()
        runner.start()
        for name, prompt in prompts.items():
            await asyncio.wrap_future(runner.add(Request(name, prompt, greedy)))
        await asyncio.wait_for(heard.wait(), BOUND_S)
        await coordinator.stop()
        await asyncio.to_thread(runner.stop)
    assert runner.failure is None
    assert (engine.calibration.epoch, engine.calibration.refused) == (1, 0)
    (greedy_says,) = survival(np.full(1, 0.95, dtype=np.float32), engine.calibration.scales.greedy)
    assert greedy_says < 0.75  # 0.95 was promised, and 0.6 came
