"""Who runs, who waits, and which pages they hold.

Pages are taken as a request grows. When they run out, the request that was admitted last gives its
pages up and waits at the head of the queue; what it had said stays said, and it goes on from there
when there is room, its draws being named by position and round and not by time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from dspark.config import EngineConfig
from dspark.engine.pages import PagePool, page_keys
from dspark.engine.sequence import Sequence
from dspark.errors import InvalidRequestError, OverloadedError
from dspark.kernels.attention_plan import PAGE_SIZE, pages_for
from dspark.scheduling.pace import Pace
from dspark.types import FinishReason, Request

_PATIENCE_S = 15.0  # without a ceiling a first token is due so late, and is not put off for ever


class Roster:
    """Belongs to one engine, and to its thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        vocab_size: int,
        max_positions: int,
        free_session: Callable[[str], None],  # of the draft side
    ) -> None:
        self._config = config
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._free_session = free_session
        self.pages = PagePool(pages_for(config.cache_tokens) + 1)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}  # in order of admission
        self.preemptions = 0
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self._pace = Pace(time.monotonic)

    def reconfigure(self, config: EngineConfig) -> None:
        """Bound the queue by `config`, and treat requests as it has their classes.

        Those of a class that is gone are of the class "default" from now on.
        """
        self._config = config
        for sequence in [*self.running.values(), *self.waiting]:
            sequence.service = config.class_or_default(sequence.request.service_class)

    def add(self, request: Request, stop_token_ids: frozenset[int]) -> None:
        """Queue a request.

        InvalidRequestError if it can never run or its class is unknown, OverloadedError if full.
        """
        total = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids:
            raise InvalidRequestError(
                "the prompt is empty; send at least one token", param="prompt"
            )
        worst = max(request.prompt_token_ids), min(request.prompt_token_ids)
        if worst[0] >= self._vocab_size or worst[1] < 0:
            raise InvalidRequestError(
                f"prompt token ids must lie in 0..{self._vocab_size - 1}; got {worst}",
                param="prompt",
            )
        limit = min(self._max_positions, self.pages.total * PAGE_SIZE)
        if total > limit:
            raise InvalidRequestError(
                f"prompt ({len(request.prompt_token_ids)} tokens) and max_tokens "
                f"({request.sampling.max_tokens}) come to {total}, more than the context of "
                f"{limit}: shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if request.id in self.running or any(s.request.id == request.id for s in self.waiting):
            raise InvalidRequestError(f"request id {request.id!r} is in use already", param="id")
        # One that comes from another verifier was let in there: it may go over the bound.
        if len(self.waiting) >= self._config.max_waiting * (2 if request.epoch else 1):
            raise OverloadedError(
                f"{len(self.waiting)} requests wait already, the most that is allowed; retry later",
                retry_after_s=self.retry_after_s,
            )
        if not self.running and not self.waiting:
            self._pace.resume()
        # What another verifier began is not refused for a class that has gone since.
        classed = self._config.class_or_default if request.epoch else self._config.service_class
        service, now = classed(request.service_class), time.monotonic()
        self.waiting.append(
            Sequence(
                request,
                stop_token_ids,
                service=service,
                waiting_since=now,
                arrived_at=now,
                # What another verifier began has been due for long.
                due_at=-math.inf
                if request.epoch
                else now + (service.max_first_token_s or _PATIENCE_S),
            )
        )

    def abort(self, request_id: str) -> None:
        """Drop a request and all it holds; an unknown one is nothing to do."""
        sequence = self.running.pop(request_id, None)
        if sequence is None:
            sequence = next((s for s in self.waiting if s.request.id == request_id), None)
            if sequence is None:
                return
            self.waiting.remove(sequence)
        sequence.finish_reason = FinishReason.ABORT
        self._let_go(sequence)

    @property
    def queue_age_s(self) -> float:
        """How long the oldest waiting request has waited; 0 if none waits. For any thread."""
        waiting = list(self.waiting)  # in one go: the engine's thread goes on meanwhile
        return time.monotonic() - min(s.waiting_since for s in waiting) if waiting else 0.0

    @property
    def retry_after_s(self) -> float:
        """When somebody who was turned away had better come back. For any thread."""
        return self._pace.wait_s(len(self.waiting))

    def expire(self) -> list[str]:
        """Drop requests that have waited for too long; their ids.

        What has begun never is, here or on another verifier.
        """
        limit_s = self._config.max_queue_s
        if not limit_s or not self.waiting:
            return []
        came_by = time.monotonic() - limit_s
        late = [s for s in self.waiting if s.waiting_since < came_by and not s.request.epoch]
        return self._drop_waiting(late)

    def dismiss(self) -> list[str]:
        """Drop all requests that have not begun; their ids."""
        return self._drop_waiting(list(self.waiting))

    def _drop_waiting(self, some: list[Sequence]) -> list[str]:
        dropped = [s for s in some if not s.begun]
        for sequence in dropped:
            self.waiting.remove(sequence)
        return [s.request.id for s in dropped]

    def admit(self) -> None:
        """Start waiting requests while there is room for what they say already.

        What has begun before comes first, then what is due first; nobody passes the one whose turn
        it is, or large requests would never have room.
        """
        while self.waiting and len(self.running) < self._config.max_requests:
            sequence = min(self.waiting, key=lambda s: s.due_at)
            # One page for each of the others to grow into, or the newcomer would soon be preempted.
            spare = len(self.running)
            if self.pages.free <= spare:
                return
            if self._config.prefix_cache:
                self._reuse(sequence)
            need = pages_for(len(sequence.tokens)) - len(sequence.pages)
            pages = self.pages.allocate(need) if self.pages.free >= need + spare else None
            if pages is None:
                self.pages.release(sequence.give_up())
                return
            sequence.hold(pages)
            self.waiting.remove(sequence)
            sequence.begun = True
            self.running[sequence.request.id] = sequence
            self.cached_tokens += sequence.computed

    def make_room(self) -> None:
        """Pages for all that the next step may compute; the oldest requests come first."""
        for sequence in list(self.running.values()):
            if sequence.request.id not in self.running:
                continue  # preempted for an older one
            block = 0 if sequence.proposal is None else len(sequence.proposal.token_ids)
            need = pages_for(len(sequence.tokens) + block) - len(sequence.pages)
            while need > 0:
                pages = self.pages.allocate(need)
                if pages is not None:
                    sequence.hold(pages)
                    break
                newest = next(reversed(self.running.values()))
                self.preempt(newest)
                if newest is sequence:
                    break

    def preempt(self, sequence: Sequence) -> None:
        """Take a running request's pages, and let it wait at the head of the queue."""
        del self.running[sequence.request.id]
        self.pages.release(sequence.give_up())
        sequence.waiting_since, sequence.due_at = time.monotonic(), -math.inf
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """After a step: let others find the pages that these have filled; drop who has finished."""
        for sequence in sequences:
            if self._config.prefix_cache:
                self._name_pages(sequence)
            if sequence.finish_reason is not None:
                del self.running[sequence.request.id]
                self._let_go(sequence)
        if self._config.check_pages:
            self.check()

    def check(self) -> None:
        """RuntimeError if a page is lost, or held otherwise than the requests believe."""
        self.pages.check(sequence.pages.tolist() for sequence in self.running.values())

    def _reuse(self, sequence: Sequence) -> None:
        """Begin after the pages that hold the same tokens already, features included.

        The last token is always computed anew: its logits decide what follows.
        """
        keys = page_keys(sequence.tokens[:-1])
        sequence.hold(self.pages.find(keys))
        sequence.keys = keys[: len(sequence.pages)]
        sequence.computed = len(sequence.pages) * PAGE_SIZE

    def _let_go(self, sequence: Sequence) -> None:
        """A request is over: its pages and its draft session."""
        self._pace.finished()
        self.pages.release(sequence.give_up())
        self._free_session(sequence.session)

    def _name_pages(self, sequence: Sequence) -> None:
        first = len(sequence.keys)
        for page, key in zip(
            sequence.pages[first:].tolist(), sequence.full_page_keys(), strict=False
        ):
            self.pages.name(page, key)
