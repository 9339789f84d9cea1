"""The state of one request inside a verifier."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.types import BlockProposal, Fence, FinishReason, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being generated. `computed` rows have been through the target."""

    request: Request
    stop_token_ids: frozenset[int]
    pages: list[int]
    slots: torch.Tensor  # [capacity] int64: slot of each position
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    round: int = 0
    sent_features: int = 0  # positions whose features the draft side has been sent
    proposal: BlockProposal | None = None
    wanted_block: Fence | None = None  # a proposal is under way
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

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
        return self.request.sampling.max_tokens - self.generated

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


def slots_of_pages(pages: list[int]) -> torch.Tensor:
    """Slots of the positions that the pages hold, in order: int64 [pages · PAGE_SIZE]."""
    first = torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_SIZE
    return (first + torch.arange(PAGE_SIZE)).flatten()


def pages_for(tokens: int) -> int:
    """Pages that `tokens` positions need."""
    return -(-tokens // PAGE_SIZE)
