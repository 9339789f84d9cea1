"""One request's way through verifiers, from the first to the one that finishes it.

A verifier streams committed tokens. When the stream breaks, the request is placed anew with a
greater epoch, and what was committed becomes part of its prompt: each token reaches the caller
once, and the next verifier goes on behind the last of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import grpc

from dspark.errors import (
    DSparkError,
    OverloadedError,
    ProtocolError,
    QueueTimeoutError,
    UnavailableError,
)
from dspark.pb import scheduler_pb2, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.status import from_rpc_error
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.services.gateway.channels import ChannelCache
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.placement import Placement
from dspark.types import FinishReason, Request, VerificationResult
from dspark.wire.requests import request_to_pb, result_from_pb

log = logging.getLogger(__name__)

# A fresh cluster says 503 after this, instead of keeping callers waiting for a first verifier.
FIRST_WAIT_S = 3.0
_MAX_CRASHES = 3  # in a row and without progress: the request itself may be what breaks verifiers
_MAX_AVOIDED = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

# The request is at fault, so that no other verifier would take it.
_FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)
_CRASH = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})


class BrokenStreamError(Exception):
    """A verifier's stream ended before the generation did; `crashed`: by the verifier's fault."""

    def __init__(self, reason: str, *, crashed: bool = False) -> None:
        super().__init__(reason)
        self.crashed = crashed


class Router:
    """Streams the committed tokens of requests, across verifiers."""

    def __init__(
        self,
        cluster: ClusterView,
        placement: Placement,
        resume_timeout_s: float,
        first_wait_s: float = FIRST_WAIT_S,
        *,
        transport: Transport = PLAINTEXT,
    ) -> None:
        self._cluster, self._placement = cluster, placement
        self.resume_timeout_s = resume_timeout_s  # of requests that begin
        self._first_wait_s = first_wait_s
        self._channels = ChannelCache(lambda: {v.address for v in cluster.verifiers}, transport)

    async def close(self) -> None:
        """Close the channels; streams under way end."""
        await self._channels.close()

    async def generate(
        self, request: Request, model: str
    ) -> AsyncGenerator[VerificationResult, None]:
        """Results up to the one with a finish reason. Closing it cancels the verifier's call.

        Raises OverloadedError before a verifier has let it in, or when that could not begin it in
        time, UnavailableError when no verifier went on in time, and whatever a verifier says
        against the request.
        """
        patience_s = self.resume_timeout_s
        if not self._cluster.ever_known:
            patience_s = min(patience_s, self._first_wait_s)
        journey = _Journey(request, patience_s)
        while True:
            verifier = None
            try:
                verifier = await self._placement.place(journey.request, model, tuple(journey.avoid))
                journey.refuse_full(verifier)
                async with aclosing(self._stream(verifier, journey.request, model)) as results:
                    async for message in results:
                        result = journey.advance(message)
                        yield result
                        if result.finish_reason is not None:
                            return
                raise BrokenStreamError("the verifier ended the stream before the generation")
            except OverloadedError as error:
                journey.overloaded(verifier, error)
                if journey.let_in:
                    await journey.pause(error)
            except (UnavailableError, BrokenStreamError) as error:
                journey.failed(verifier, error)
                await journey.pause(error)

    async def _stream(
        self, verifier: scheduler_pb2.Replica, request: Request, model: str
    ) -> AsyncGenerator[verifier_pb2.GenerateTokensResponse, None]:
        async with self._channels.use(verifier.address) as channel:
            stub = verifier_pb2_grpc.VerifierStub(channel)
            call = stub.GenerateTokens(request_to_pb(request, model))
            try:
                async for message in call:
                    yield message
            except grpc.aio.AioRpcError as error:
                raise _meaning(error) from error
            finally:
                call.cancel()


class _Journey:
    """What is known of a request on its way: tokens so far, who failed it, for how long."""

    def __init__(self, request: Request, patience_s: float) -> None:
        self._original, self._patience_s = request, patience_s
        self.request = request
        self._committed: list[int] = []
        self.avoid: dict[str, None] = {}  # incarnations, oldest first
        self._full: dict[str, OverloadedError] = {}
        self._failures = 0  # since the last progress
        self._crashes = 0
        self._trouble_since: float | None = None

    @property
    def let_in(self) -> bool:
        """Whether a verifier has had it already: then it waits rather than be refused."""
        return bool(self._committed) or self.request.epoch > 0

    def advance(self, message: verifier_pb2.GenerateTokensResponse) -> VerificationResult:
        """Take in committed tokens; BrokenStreamError if the message breaks the contract."""
        try:
            result = result_from_pb(self._original.id, message)
        except ProtocolError as error:
            raise BrokenStreamError(str(error), crashed=True) from error
        left = self._original.sampling.max_tokens - len(self._committed)
        if not 0 < len(result.token_ids) <= left:
            raise BrokenStreamError(
                f"the verifier committed {len(result.token_ids)} tokens where 1 to {left} were due",
                crashed=True,
            )
        self._committed += result.token_ids
        self._failures = self._crashes = 0
        self._trouble_since = None
        self._full.clear()
        if len(result.token_ids) == left and result.finish_reason is not FinishReason.STOP:
            # Nothing can follow: do not go looking for who would say so.
            return replace(result, finish_reason=FinishReason.LENGTH)
        if result.finish_reason is FinishReason.ABORT:
            # The verifier gave it up, the caller did not: its stream ends here and another goes on.
            return replace(result, finish_reason=None)
        return result

    def refuse_full(self, verifier: scheduler_pb2.Replica) -> None:
        """OverloadedError if the scheduler had nobody but one that is full."""
        if verifier.incarnation in self._full and not self.let_in:
            raise min(self._full.values(), key=lambda error: error.retry_after_s)

    def overloaded(self, verifier: scheduler_pb2.Replica | None, error: OverloadedError) -> None:
        """Note who is full; OverloadedError if that is the last word."""
        if not self.let_in and (
            verifier is None
            or verifier.incarnation in self._full
            or isinstance(error, QueueTimeoutError)  # another queue would only begin anew
        ):
            raise error
        if verifier is not None:
            self._full[verifier.incarnation] = error
            self._shun(verifier)
            if self.let_in:
                self._begin_epoch()

    def failed(self, verifier: scheduler_pb2.Replica | None, error: Exception) -> None:
        """Note who failed; UnavailableError if verifiers crash one after the other."""
        if verifier is None:
            return
        log.warning(
            "request %s, epoch %d: %s failed after %d tokens: %s",
            self._original.id, self.request.epoch, verifier.address, len(self._committed), error,
        )  # fmt: skip
        self._shun(verifier)
        self._begin_epoch()
        self._crashes += isinstance(error, BrokenStreamError) and error.crashed
        if self._crashes >= _MAX_CRASHES:
            raise UnavailableError(
                f"{self._crashes} verifiers in a row failed this request, lastly: {error}; see "
                "their logs"
            ) from error

    async def pause(self, error: Exception) -> None:
        """Wait before the next try; UnavailableError once there was no progress for too long."""
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        silent_s = now - self._trouble_since
        if silent_s >= self._patience_s:
            raise UnavailableError(
                f"no verifier went on with the request within {self._patience_s:g} s, lastly: "
                f"{error}; retry later"
            ) from error
        self._failures += 1
        if self._failures > 1:  # the first retry, on another verifier, is at once
            wish_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 8))
            await asyncio.sleep(min(wish_s, self._patience_s - silent_s))

    def _shun(self, verifier: scheduler_pb2.Replica) -> None:
        """Try others before it."""
        self.avoid.pop(verifier.incarnation, None)
        self.avoid[verifier.incarnation] = None
        if len(self.avoid) > _MAX_AVOIDED:
            del self.avoid[next(iter(self.avoid))]

    def _begin_epoch(self) -> None:
        """A verifier may still be at it; with a new epoch its words no longer count."""
        original, committed = self._original, len(self._committed)
        self.request = replace(
            original,
            prompt_token_ids=(*original.prompt_token_ids, *self._committed),
            sampling=replace(
                original.sampling, max_tokens=original.sampling.max_tokens - committed
            ),
            epoch=self.request.epoch + 1,
        )


def _meaning(error: grpc.aio.AioRpcError) -> DSparkError | BrokenStreamError:
    code = error.code()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return from_rpc_error(error)
    reason = f"{code.name}: {error.details()}"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"the verifier does not speak our contract ({reason})")
    if code in _FINAL:
        return from_rpc_error(error)
    return BrokenStreamError(reason, crashed=code in _CRASH)
