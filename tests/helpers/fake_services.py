"""A scripted verifier and scheduler behind real gRPC servers, true to the contracts."""

# ruff: noqa: N802 (methods are named as in the protos)

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc

from dspark.pb import common_pb2, scheduler_pb2_grpc, verifier_pb2_grpc
from dspark.pb import scheduler_pb2 as sp
from dspark.pb import verifier_pb2 as vp

Answers = Callable[[vp.GenerateTokensRequest], list[int]]


class Oracle:
    """The one right answer to every request: what any verifier has to go on with.

    It remembers where each request's prompt ended, so that an answer continues over placements.
    """

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self._prompt_tokens: dict[str, int] = {}

    def __call__(self, request: vp.GenerateTokensRequest) -> list[int]:
        prompt = list(request.prompt_token_ids)
        start = self._prompt_tokens.setdefault(request.request_id, len(prompt))
        committed = prompt[start:]
        assert committed == self.answer[: len(committed)], "a token was lost, changed or repeated"
        return self.answer[len(committed) :]


@dataclass(frozen=True, slots=True)
class Script:
    """How one call goes. Steps are counted within the call."""

    fail_at: int | None = None  # fail before this step …
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    details: str = "scripted"
    trailing: tuple[tuple[str, str], ...] = ()
    end_at: int | None = None  # … or end the stream as if all were well
    hold_at: int | None = None  # … or wait for `FakeVerifier.release`
    replies: tuple[vp.GenerateTokensResponse, ...] | None = None  # … or say just this


class FakeVerifier(verifier_pb2_grpc.VerifierServicer):
    """Answers from `answers`, `block` tokens a step, all but the last of them drafted."""

    def __init__(
        self,
        answers: Answers,
        *,
        model: str,
        stop_token_id: int = -1,
        block: int = 3,
        context_tokens: int = 512,
    ) -> None:
        self.answers, self.model, self.block = answers, model, block
        self.stop_token_id, self.context_tokens = stop_token_id, context_tokens
        self.incarnation = uuid4().hex
        self.scripts: deque[Script] = deque()  # of the next calls; afterwards all goes well
        self.requests: list[vp.GenerateTokensRequest] = []
        self.called, self.held = asyncio.Event(), asyncio.Event()
        self.release, self.cancelled = asyncio.Event(), asyncio.Event()
        self._server: Any = None
        self.address = ""

    async def start(self) -> FakeVerifier:
        self._server = grpc.aio.server()
        verifier_pb2_grpc.add_VerifierServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def kill(self) -> None:
        """End as a killed process does: every stream breaks."""
        await self._server.stop(None)

    def replica(self) -> sp.Replica:
        return sp.Replica(
            role=sp.ROLE_VERIFIER,
            incarnation=self.incarnation,
            address=self.address,
            model=self.model,
            max_context_tokens=self.context_tokens,
        )

    async def GenerateTokens(
        self, request: vp.GenerateTokensRequest, context: Any
    ) -> AsyncIterator[vp.GenerateTokensResponse]:
        self.requests.append(request)
        self.called.set()
        script = self.scripts.popleft() if self.scripts else Script()
        done = False
        try:
            usual = self._replies(request)
            replies = usual if script.replies is None else list(script.replies)
            for i, reply in enumerate(replies):
                if i == script.end_at:
                    done = True
                    return
                if i == script.fail_at:
                    done = True
                    await context.abort(script.code, script.details, script.trailing)
                if i == script.hold_at:
                    self.held.set()
                    await self.release.wait()
                yield reply
            done = True
        finally:  # by CancelledError here, or by GeneratorExit when it struck while sending
            if not done:
                self.cancelled.set()

    def _replies(self, request: vp.GenerateTokensRequest) -> list[vp.GenerateTokensResponse]:
        tokens = self.answers(request)[: request.sampling.max_tokens]
        assert tokens, "the oracle has nothing to say: give it a longer answer"
        steps = [tokens[i : i + self.block] for i in range(0, len(tokens), self.block)]
        replies = []
        for step in steps:
            accepted = len(step) - 1
            replies.append(
                vp.GenerateTokensResponse(
                    token_ids=step, drafted=self.block, verified=accepted, accepted=accepted
                )
            )
        stopped = tokens[-1] == self.stop_token_id
        replies[-1].finish_reason = (
            common_pb2.FINISH_REASON_STOP if stopped else common_pb2.FINISH_REASON_LENGTH
        )
        return replies


class FakeScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Places on the first verifier that is not to be avoided."""

    def __init__(self, *verifiers: FakeVerifier) -> None:
        self.verifiers = list(verifiers)
        # Of the next placements: code, details and perhaps trailing metadata.
        self.refusals: deque[tuple[Any, ...]] = deque()
        self.places: list[sp.PlaceRequest] = []
        self.placed, self.answer_places = asyncio.Event(), asyncio.Event()
        self.answer_places.set()
        self.beats: list[sp.HeartbeatRequest] = []
        self.beaten = asyncio.Event()
        self._server: Any = None
        self.address = ""

    async def start(self) -> FakeScheduler:
        self._server = grpc.aio.server()
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def kill(self) -> None:
        await self._server.stop(None)

    async def next_beats(self, count: int = 2) -> None:
        """Wait for heartbeats; at the second, the answer to the first has been taken in."""
        for _ in range(count):
            self.beaten.clear()
            await asyncio.wait_for(self.beaten.wait(), 10)

    async def Heartbeat(self, request: sp.HeartbeatRequest, context: Any) -> sp.HeartbeatResponse:
        self.beats.append(request)
        self.beaten.set()
        return sp.HeartbeatResponse(
            lease_ms=5000, verifiers=[verifier.replica() for verifier in self.verifiers]
        )

    async def Place(self, request: sp.PlaceRequest, context: Any) -> sp.PlaceResponse:
        self.places.append(request)
        self.placed.set()
        await self.answer_places.wait()
        if self.refusals:
            await context.abort(*self.refusals.popleft())
        hosts = [v for v in self.verifiers if v.model == request.model]
        if not hosts:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"nobody hosts {request.model!r}")
        fresh = [v for v in hosts if v.incarnation not in request.avoid_incarnations]
        return sp.PlaceResponse(verifier=(fresh or hosts)[0].replica())
