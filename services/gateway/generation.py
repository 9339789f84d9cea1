"""From a request to parts of text: the one path behind both protocols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

from dspark.errors import InvalidRequestError, ModelNotFoundError, OverloadedError, UnavailableError
from dspark.scheduling.pace import Pace
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.detokenize import TokenDecoder
from dspark.services.gateway.request import GenerationRequest, fit, sampling_of
from dspark.services.gateway.router import FIRST_WAIT_S, Router
from dspark.services.gateway.speculation import SpeculationStats, SpeculationTally
from dspark.services.gateway.text_stream import TextSpan, TextStream
from dspark.services.gateway.tokenizing import PromptEncoder
from dspark.types import FinishReason, Request
from dspark.wire.bounds import MAX_POSITION


@dataclass(frozen=True, slots=True)
class Finish:
    """What is known at the end."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int  # a stop token included; none behind a stop string
    speculation: SpeculationStats


@dataclass(frozen=True, slots=True)
class Part:
    """What one step added; the last part has a `finish`."""

    id: str
    spans: tuple[TextSpan, ...]
    token_ids: tuple[int, ...]
    finish: Finish | None = None

    @property
    def text(self) -> str:
        """The spans' text, joined."""
        return "".join(span.text for span in self.spans)


class Generator:
    """Generates for callers, at most `max_in_flight` at a time."""

    def __init__(
        self,
        model: str,
        encoder: PromptEncoder,
        make_decoder: Callable[[], TokenDecoder],
        router: Router,
        cluster: ClusterView,
        max_in_flight: int,
        service_class: Callable[[str], object],  # InvalidRequestError for a name that is not known
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self.model, self.cluster = model, cluster
        self._encoder, self._make_decoder, self._router = encoder, make_decoder, router
        self._max_in_flight, self._first_wait_s = max_in_flight, first_wait_s
        self._service_class = service_class
        self._in_flight, self._pace = 0, Pace()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def reconfigure(self, max_in_flight: int, service_class: Callable[[str], object]) -> None:
        """Let new requests in by these; those under way go on."""
        self._max_in_flight, self._service_class = max_in_flight, service_class

    @property
    def in_flight(self) -> int:
        """Requests being generated."""
        return self._in_flight

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what is under way, for a while."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def generate(self, asked: GenerationRequest) -> AsyncGenerator[Part, None]:
        """Parts of the answer, the last with a finish. Closing it frees all that it held.

        Raises a DSparkError: before the first part, or in between when verifiers are lost for good.
        """
        self.check_model(asked.model)
        self._check_class(asked)
        sampling = sampling_of(asked.wish)
        with self._admitted():
            context_tokens = await self._context_tokens()
            prompt = await self._encoder.encode(asked.prompt, asked.prompt_field, context_tokens)
            sampling = fit(sampling, asked, len(prompt), context_tokens)
            request = Request(
                f"gen-{uuid4().hex}", prompt, sampling, service_class=asked.service_class
            )
            text = TextStream(self._make_decoder(), asked.stop)
            tally = SpeculationTally()
            completion_tokens = 0
            async with aclosing(self._router.generate(request, self.model)) as results:
                async for result in results:
                    tally.add(result)
                    piece = text.push(result)
                    completion_tokens += len(piece.token_ids)
                    if piece.finish_reason is not None:
                        break
                    yield Part(request.id, piece.spans, piece.token_ids)
            # Outside: a stop string has let go of the verifier before the caller reads on.
            assert piece.finish_reason is not None
            finish = Finish(piece.finish_reason, len(prompt), completion_tokens, tally.stats())
            yield Part(request.id, piece.spans, piece.token_ids, finish)

    def check_model(self, name: str) -> None:
        """ModelNotFoundError unless this is the model."""
        if name != self.model:
            raise ModelNotFoundError(
                f"there is no model {name!r} here; this server has {self.model!r}"
            )

    def _check_class(self, asked: GenerationRequest) -> None:
        try:
            self._service_class(asked.service_class)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{asked.class_field}: {error}", param=asked.class_field
            ) from error

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._draining:
            raise UnavailableError("this gateway is shutting down: retry on another")
        if self._in_flight >= self._max_in_flight:
            raise OverloadedError(
                f"the gateway has {self._in_flight} requests in flight, which is its limit: retry "
                "later, or raise gateway.max_in_flight",
                retry_after_s=self._pace.wait_s(1),
            )
        if not self._in_flight:
            self._pace.resume()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._pace.finished()
            if not self._in_flight:
                self._idle.set()

    async def _context_tokens(self) -> int:
        if not await self.cluster.wait_known(self._first_wait_s):
            raise UnavailableError(
                f"no verifier of {self.model!r} has been heard of yet: it may still be loading; "
                "retry in a while, or look into the verifier's and scheduler's logs"
            )
        return self.cluster.context_tokens or MAX_POSITION  # it is for the verifier to refuse
