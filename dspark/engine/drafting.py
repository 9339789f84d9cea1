"""The draft side: context taken in, and blocks drafted for many sessions at once."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from dspark.decoding.drawing import INDEPENDENT, DrawnBlocks
from dspark.engine.draft_sessions import DraftSessions, Rows
from dspark.kernels.cpu import operators
from dspark.kernels.transfer import to_host
from dspark.models.kv_cache import PagedKVCache
from dspark.types import BlockProposal, DraftWork, Fence, ResyncRequest, SamplingParams

CANDIDATES = 64  # K: entries of a sparse proposal law


@dataclass(frozen=True, slots=True)
class Draft:
    """Blocks that were drawn together, on the device. A work's block is as long as it asks for."""

    works: list[DraftWork]
    kinds: list[int]
    drawn: DrawnBlocks

    def proposals(
        self,
        tokens: torch.Tensor,  # of DrawnBlocks, on the host, like the others
        confidence_logits: torch.Tensor,
        candidate_ids: torch.Tensor,
        candidate_probs: torch.Tensor,
    ) -> list[BlockProposal]:
        """A block a work; its law where it has to be known."""
        token_ids, confidences = tokens.numpy(), torch.sigmoid(confidence_logits).numpy()
        ids, probs = candidate_ids.numpy(), candidate_probs.numpy()
        return [
            BlockProposal(
                fence=work.fence,
                token_ids=token_ids[s, : work.block_size],
                confidences=confidences[s, : work.block_size],
                candidate_ids=ids[s, : work.block_size] if kind == INDEPENDENT else None,
                candidate_probs=probs[s, : work.block_size] if kind == INDEPENDENT else None,
            )
            for s, (work, kind) in enumerate(zip(self.works, self.kinds, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class BegunDrafts:
    """What a DraftEngine was asked for; the device may still be at it."""

    drafts: list[Draft]
    resyncs: list[ResyncRequest]

    @torch.inference_mode()
    def proposals(self) -> list[BlockProposal]:
        """The blocks, waited for."""
        tensors = [tensor for draft in self.drafts for tensor in draft.drawn.tensors]
        arrived = iter(to_host(tensors))
        return [
            proposal
            for draft in self.drafts
            for proposal in draft.proposals(*islice(arrived, len(draft.drawn.tensors)))
        ]


class Drafter(Protocol):
    """A model that drafts, ready for inference: DSparkBlocks, or AutoregressiveBlocks."""

    block_size: int  # γ, the longest block
    vocab_size: int  # V, the target's
    feature_width: int  # d of the features that it reads; 0: it reads token ids
    context_window: int  # context rows that a block sees; 0: all
    trained_length: int  # positions; 0: not known
    device: torch.device

    def rows(self, block_size: int) -> int:
        """Rows that a block of so many draft tokens takes."""

    def draft(
        self,
        rows: Seq[Rows],
        wanting: Seq[Rows],  # among them
        kv: PagedKVCache,
        candidates: int,  # K
    ) -> list[Draft]:
        """Write all rows, in order; then a block after each of those that want one."""

    def warm_up(self, kv: PagedKVCache, candidates: int) -> None:
        """On a GPU: capture what blocks take, before anybody waits for it."""


class DraftEngine:
    """Drafts blocks. Not thread-safe: one thread owns it."""

    def __init__(self, drafter: Drafter, num_pages: int) -> None:
        self.drafter = drafter
        self._kv = PagedKVCache(num_pages, drafter.device)
        self.held = DraftSessions(
            num_pages,
            context_window=drafter.context_window,
            trained_length=drafter.trained_length,
            rows=drafter.rows,
        )

    @property
    def sessions(self) -> int:
        """Sessions that hold context."""
        return len(self.held.names)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Pay for first uses, the cache's memory above all, before the first work comes."""
        width = self.drafter.feature_width
        work = DraftWork(
            fence=Fence("", 0, 0, 2),
            feature_start=0,
            features=torch.zeros(1 if width else 0, width),
            anchor_token_id=0,
            block_size=self.drafter.block_size,
            sampling=SamplingParams(temperature=0.0),
            token_ids=None if width else torch.zeros(1, dtype=torch.int64),
        )
        self.run([work])
        self.free("")
        if self.drafter.device.type == "cuda":
            self.drafter.warm_up(self._kv, CANDIDATES)

    def free(self, session: str) -> None:
        """Forget a session; an unknown one is nothing to do."""
        self.held.free(session)

    def check_pages(self) -> None:
        """RuntimeError if a page is lost or held twice."""
        self.held.check_pages()

    def run(self, works: Seq[DraftWork]) -> tuple[list[BlockProposal], list[ResyncRequest]]:
        """Take in context, then draft a block for each work that wants one.

        A work whose context leaves a gap after what its session holds is answered with a resync
        request for that session, and concerns no other. A stale one gets no block.
        """
        begun = self.begin(works)
        return begun.proposals(), begun.resyncs

    @torch.inference_mode()
    def begin(self, works: Seq[DraftWork]) -> BegunDrafts:
        """The same, without waiting for a GPU."""
        operators.spread_threads()
        rows, resyncs = self.held.take_in(works)
        drafts = self.drafter.draft(rows, self.held.wanting(rows), self._kv, CANDIDATES)
        return BegunDrafts(drafts, resyncs)
