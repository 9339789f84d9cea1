"""Step reports out, plans and calibration tables in; never waited for by a step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from dspark.engine.runner import EngineRunner
from dspark.errors import ProtocolError
from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.pb import scheduler_pb2, scheduler_pb2_grpc
from dspark.scheduling.calibration import CalibrationTable
from dspark.types import StepPlan, StepReport
from dspark.wire.plans import plan_from_pb, report_to_pb, table_from_pb

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_MAX_QUEUED_REPORTS = 256  # beyond, the oldest are left out: news is worth more than history


class Coordinator:
    """Keeps a Coordinate stream to whatever scheduler the lease knows.

    Plans come in rising epochs, whoever sent them; one that does not was sent by a scheduler that
    has been replaced, or twice. It is refused with all that it brings, and counted.
    """

    def __init__(
        self,
        incarnation: str,
        channel: Callable[[], grpc.aio.Channel | None],
        on_plan: Callable[[StepPlan], None],
        on_calibration: Callable[[CalibrationTable], None],
    ) -> None:
        self._incarnation, self._channel = incarnation, channel
        self._on_plan, self._on_calibration = on_plan, on_calibration
        self._loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[StepReport] = asyncio.Queue(_MAX_QUEUED_REPORTS)
        self._task: asyncio.Task[None] | None = None
        self._epoch = 0  # of the newest plan
        self._refused = 0

    def start(self) -> None:
        """Begin on the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def report(self, report: StepReport) -> None:
        """Send a report soon; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._put, report)

    def _put(self, report: StepReport) -> None:
        if self._reports.full():
            self._reports.get_nowait()
        self._reports.put_nowait(report)

    async def _run(self) -> None:
        while True:
            channel = self._channel()
            if channel is not None:
                try:
                    await self._stream(channel)
                except (
                    grpc.aio.AioRpcError,
                    grpc.aio.UsageError,
                    asyncio.InvalidStateError,
                ) as error:
                    log.warning("no plans from the scheduler for now: %s", error)
                except asyncio.CancelledError:
                    # The lease keeper closes the channel when it turns to another scheduler.
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
                    log.warning("no plans for now: the scheduler was lost")
            await asyncio.sleep(_RETRY_S)

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        call = scheduler_pb2_grpc.SchedulerStub(channel).Coordinate()
        writer = asyncio.create_task(self._write(call))
        reader = asyncio.create_task(self._read(call))
        try:
            done, _ = await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            writer.cancel()
            reader.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
            call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        # an idle verifier introduces itself too, so that it has a plan when work comes
        await call.write(scheduler_pb2.StepReport(incarnation=self._incarnation))
        while True:
            report = report_to_pb(await self._reports.get(), self._incarnation)
            report.plans_refused = self._refused
            await call.write(report)

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return
            try:
                plan = plan_from_pb(message)
                if plan.epoch <= self._epoch:
                    self._refuse(plan.epoch)
                    continue
                self._epoch = plan.epoch
                self._on_plan(plan)
                if message.HasField("calibration"):
                    self._on_calibration(table_from_pb(message.calibration))
            except ProtocolError as error:
                log.warning("of a plan, this was dropped: %s", error)

    def _refuse(self, epoch: int) -> None:
        if not self._refused:
            log.warning("refused a plan of epoch %d: there was one of %d", epoch, self._epoch)
        self._refused += 1


def load_to_pb(runner: EngineRunner) -> scheduler_pb2.Load:
    """How busy a verifier is, for its heartbeats."""
    bounds, (running, waiting, free, total) = runner.config, runner.load
    return scheduler_pb2.Load(
        running=running,
        waiting=waiting,
        free_pages=free,
        total_pages=total,
        page_tokens=PAGE_SIZE,
        max_running=bounds.max_requests,
        max_waiting=bounds.max_waiting,
        retry_after_ms=round(runner.retry_after_s * 1000),
    )
