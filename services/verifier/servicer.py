"""dspark.v1.Verifier over an EngineRunner: decode, queue, stream committed tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import grpc

from dspark.engine.runner import EngineRunner
from dspark.errors import (
    DSparkError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from dspark.pb import verifier_pb2 as pb
from dspark.pb import verifier_pb2_grpc
from dspark.rpc.status import abort
from dspark.scheduling.explanation import KEPT_STEPS
from dspark.types import VerificationResult
from dspark.wire.explanation import steps_to_pb
from dspark.wire.requests import request_from_pb, result_to_pb


class VerifierServicer(verifier_pb2_grpc.VerifierServicer):
    """Streams of committed tokens. `deliver`, `refuse`, `fail`: to be called from any thread."""

    def __init__(self, model: str, loop: asyncio.AbstractEventLoop) -> None:
        self._model = model
        self._loop = loop
        self._runner: EngineRunner | None = None
        self._draining = False
        self._streams: dict[str, asyncio.Queue[VerificationResult | DSparkError]] = {}

    def attach(self, runner: EngineRunner) -> None:
        """Serve from this engine."""
        self._runner = runner

    @property
    def streams(self) -> int:
        """Calls under way."""
        return len(self._streams)

    def deliver(self, results: list[VerificationResult]) -> None:
        """Hand a step's tokens to their streams: one hop to the event loop a step."""
        self._loop.call_soon_threadsafe(self._deliver, results)

    def refuse(self, refusals: Mapping[str, DSparkError]) -> None:
        """End the streams of requests that the engine has dropped."""
        self._loop.call_soon_threadsafe(self._refuse, refusals)

    def check(self) -> None:
        """UnavailableError if the engine failed or hangs; its streams then wait no longer."""
        assert self._runner is not None
        try:
            self._runner.check()
        except UnavailableError as error:
            self._fail(error)
            raise

    def drain(self) -> None:
        """Take nothing new, and send away who waits: gateways go on elsewhere at once."""
        self._draining = True
        if self._runner is not None:
            self._runner.dismiss(_leaving())

    def fail(self, error: BaseException) -> None:
        """End every stream: the engine is gone, and the gateway will go on elsewhere."""
        self._loop.call_soon_threadsafe(self._fail, UnavailableError(f"engine failed: {error}"))

    async def GenerateTokens(  # noqa: N802 - the name is the contract's
        self, request: pb.GenerateTokensRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateTokensResponse]:
        """Generate for one request; cancelling frees all it holds."""
        try:
            name, results = await self._begin(request)
        except DSparkError as error:
            await abort(context, error)
        assert self._runner is not None
        finished = False
        try:
            while not finished:
                result = await results.get()
                if isinstance(result, DSparkError):
                    finished = True
                    await abort(context, result)
                finished = result.finish_reason is not None
                yield result_to_pb(result)
        finally:
            self._streams.pop(name, None)
            if not finished:
                self._runner.abort(name)

    async def ExplainSteps(  # noqa: N802
        self, request: pb.ExplainStepsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExplainStepsResponse:
        """What the last steps did, and why."""
        try:
            if not 1 <= request.count <= KEPT_STEPS:
                raise InvalidRequestError(
                    f"count must be between 1 and {KEPT_STEPS}; got {request.count}", param="count"
                )
            if self._runner is None:
                raise UnavailableError("this verifier is still starting")
        except DSparkError as error:
            await abort(context, error)
        runner = self._runner
        # Apart from the event loop: of many requests this is too much between two tokens.
        return await asyncio.to_thread(lambda: steps_to_pb(runner.explain(request.count)))

    async def _begin(
        self, message: pb.GenerateTokensRequest
    ) -> tuple[str, asyncio.Queue[VerificationResult | DSparkError]]:
        if message.model != self._model:
            raise ModelNotFoundError(f"this verifier hosts {self._model!r}, not {message.model!r}")
        request = request_from_pb(message)
        if self._runner is None:
            raise UnavailableError("this verifier is still starting")
        if self._draining:
            raise _leaving()
        self._runner.check()  # what is queued behind a step that hangs is not answered
        results: asyncio.Queue[VerificationResult | DSparkError] = asyncio.Queue()
        # Before the engine has it: the first result may come before `add` has returned here.
        if request.id in self._streams:
            # a retry of the same call, whose first attempt has not been seen to end yet
            raise UnavailableError(f"request {request.id!r} is under way here already; retry")
        self._streams[request.id] = results
        try:
            await asyncio.wrap_future(self._runner.add(request))
        except asyncio.CancelledError:
            self._runner.abort(request.id)  # the engine may have it already
            self._streams.pop(request.id, None)
            raise
        except DSparkError:
            self._streams.pop(request.id, None)
            raise
        return request.id, results

    def _deliver(self, results: list[VerificationResult]) -> None:
        for result in results:
            stream = self._streams.get(result.request_id)
            if stream is not None:
                stream.put_nowait(result)

    def _refuse(self, refusals: Mapping[str, DSparkError]) -> None:
        for name, error in refusals.items():
            stream = self._streams.get(name)
            if stream is not None:
                stream.put_nowait(error)

    def _fail(self, error: DSparkError) -> None:
        for stream in self._streams.values():
            stream.put_nowait(error)


def _leaving() -> UnavailableError:
    return UnavailableError("this verifier is shutting down: go on with another")
