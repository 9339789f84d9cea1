"""The state of one request inside a verifier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from dspark.config import ServiceClass
from dspark.engine.pages import PageKey, page_keys
from dspark.engine.text_index import TextIndex
from dspark.kernels.attention_plan import PAGE_SIZE, Pages
from dspark.scheduling.draft_policy import Prospect
from dspark.types import BlockProposal, Fence, FinishReason, IntArray, Request

_SETTLED_S = 1.0


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being generated. `computed` rows have been through the target."""

    request: Request
    stop_token_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    pages: Pages = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # in order
    keys: list[PageKey] = field(default_factory=list)  # names of its full pages so far
    computed: int = 0
    round: int = 0
    sent_features: int = 0  # positions whose features the draft side has been sent
    proposal: BlockProposal | None = None
    wanted_block: Fence | None = None  # a proposal is under way
    asked_at: float = 0.0  # when it was asked for, on the monotonic clock
    index: TextIndex | None = None  # once blocks have been looked up
    prospect: Prospect = field(default_factory=Prospect)
    service: ServiceClass = field(default_factory=ServiceClass)
    begun: bool = False  # it has been admitted once
    # On the monotonic clock, seconds:
    waiting_since: float = 0.0  # while it waits
    arrived_at: float = 0.0
    due_at: float = 0.0  # its first token; of what waits, what is due first begins first
    first_token_at: float = 0.0  # 0: not yet
    finish_reason: FinishReason | None = None

    _most: int = field(init=False, default=0)  # tokens that it may come to

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self._most = len(self.tokens) + self.request.sampling.max_tokens

    @property
    def session(self) -> str:
        """Name of this request's draft session."""
        return self.request.id

    @property
    def generated(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def decoding(self) -> bool:
        """Whether everything but the anchor has been through the target."""
        return self.computed == len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self._most - len(self.tokens)

    @property
    def useful(self) -> int:
        """Draft tokens that a block can bring now: the last token is the target's own."""
        return self.remaining - 1 if self.decoding and self.finish_reason is None else 0

    def tokens_per_s(self, now: float) -> float:
        """How fast its answer has come so far, from its first token on; infinite in the beginning.

        Over too short a time, a rate says more of when it is asked for than of the rate.
        """
        took_s = now - self.first_token_at
        if not self.first_token_at or took_s < _SETTLED_S:
            return math.inf
        return (self.generated - 1) / took_s

    def hold(self, pages: list[int]) -> None:
        """Take pages for the positions after those held."""
        self.pages = np.append(self.pages, np.array(pages, dtype=np.int32))

    def slots(self, start: int, end: int) -> IntArray:  # [end - start]
        """Slots of positions start..end-1."""
        positions = np.arange(start, end)
        pages = self.pages[positions // PAGE_SIZE].astype(np.int64)
        slots: IntArray = pages * PAGE_SIZE + positions % PAGE_SIZE
        return slots

    def give_up(self) -> list[int]:
        """Let go of all pages, and of what they held; all else stays, so that it can go on."""
        pages: list[int] = self.pages.tolist()
        self.pages, self.keys = self.pages[:0], []
        self.computed = 0
        self.proposal = self.wanted_block = self.index = None
        return pages

    def full_page_keys(self) -> list[PageKey]:
        """Names of pages that have become full since the last call."""
        known = len(self.keys)
        end = self.computed // PAGE_SIZE * PAGE_SIZE
        if end <= known * PAGE_SIZE:
            return []
        parent = self.keys[-1] if self.keys else b""
        self.keys += page_keys(self.tokens[known * PAGE_SIZE : end], parent)
        return self.keys[known:]

    def fence(self) -> Fence:
        """Names the state that a block drafted now belongs to."""
        return Fence(self.session, self.request.epoch, self.round, len(self.tokens))

    def commit(self, tokens: list[int]) -> tuple[int, ...]:
        """Append tokens up to the first that ends the request: the only place where output ends.

        Returns those that were kept. A stop token is kept, being the target's own choice.
        """
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            if token in self.stop_token_ids:
                self.finish_reason = FinishReason.STOP
            elif len(kept) == self.remaining:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
        self.tokens.extend(kept)
        return tuple(kept)
