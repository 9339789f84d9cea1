"""Step times that the scheduler keeps for verifiers of the same kind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from dspark.errors import ProtocolError, StepTableError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.scheduling.step_table import StepTimeTable
from dspark.wire.step_times import step_times_from_pb, step_times_to_pb

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0  # a start waits no longer, since it can measure by itself

T = TypeVar("T")


class SharedStepTimes:
    """A StepTimeStore at the scheduler that `locate` finds.

    Make it on an event loop that goes on meanwhile, and use it on another thread.
    """

    def __init__(
        self, locate: Callable[[], Awaitable[str]], *, transport: Transport = PLAINTEXT
    ) -> None:
        self._locate, self._transport = locate, transport
        self._loop = asyncio.get_running_loop()
        self._answers = True

    def get(self, fingerprint: str) -> StepTimeTable | None:
        """The table that another verifier measured on the same; None if there is none to be had."""
        answer = self._ask(
            lambda stub: stub.GetStepTimes(pb.GetStepTimesRequest(fingerprint=fingerprint))
        )
        try:
            if answer is None:
                return None
            table = step_times_from_pb(answer.table)
            table.check_fits(fingerprint)
        except (ProtocolError, StepTableError) as error:
            log.warning("the scheduler's step times are of no use: %s", error)
            return None
        return table

    def put(self, table: StepTimeTable) -> None:
        """Offer a table to others, unless the scheduler has failed to answer before."""
        if self._answers:
            request = pb.PutStepTimesRequest(table=step_times_to_pb(table))
            self._ask(lambda stub: stub.PutStepTimes(request))

    def _ask(self, call: Callable[[Any], Awaitable[T]]) -> T | None:
        return asyncio.run_coroutine_threadsafe(self._answer(call), self._loop).result()

    async def _answer(self, call: Callable[[Any], Awaitable[T]]) -> T | None:
        try:
            async with (
                asyncio.timeout(_PATIENCE_S),
                self._transport.channel(await self._locate()) as channel,
            ):
                return await call(scheduler_pb2_grpc.SchedulerStub(channel))
        except Exception as error:  # the locator is Ray's and may raise anything
            if isinstance(error, grpc.aio.AioRpcError):
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return None
                reason = error.details()
            else:
                reason = str(error) or type(error).__name__
            self._answers = False
            log.warning("no step times are shared with the scheduler: %s", reason)
            return None
