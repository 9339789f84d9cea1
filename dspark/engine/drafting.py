"""The draft side: sessions of context keys and values, and blocks drafted for many at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dspark.decoding.acceptance import sample
from dspark.decoding.law import proposal_law
from dspark.decoding.noise import Stream, draw_key, gumbel, key_tensor, uniform
from dspark.engine.pages import PageAllocator
from dspark.engine.sequence import pages_for, slots_of_pages
from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.kernels.dispatch import RowStore
from dspark.models.drafter import DSparkDrafter
from dspark.types import BlockProposal, DraftWork, ResyncRequest, SamplingParams, VerifyMode

CANDIDATES = 64  # K: entries of a sparse proposal law


@dataclass(slots=True)
class _Session:
    epoch: int
    pages: list[int]
    slots: torch.Tensor  # [pages · PAGE_SIZE]
    length: int  # positions 0..length-1 hold context


@dataclass(slots=True)
class _GatheredContext:
    """Context keys and values of a batch of sessions, padded to the longest."""

    stores: list[RowStore]
    slots: torch.Tensor  # [S, L]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = self.slots.shape
        flat, store = self.slots.flatten(), self.stores[index]
        keys, values = (
            t.index_select(0, flat).view(batch, length, *t.shape[1:]).transpose(1, 2)
            for t in (store.keys, store.values)
        )
        return keys, values


class DraftEngine:
    """Drafts blocks. Not thread-safe: one thread owns it."""

    def __init__(self, drafter: DSparkDrafter, num_pages: int) -> None:
        self.drafter = drafter
        self.block_size = drafter.config.block_size
        self.dtype = drafter.norm.weight.dtype
        self.device = drafter.norm.weight.device
        self._pages = PageAllocator(num_pages)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # least recently used first
        # Slot 0 pads gathers: nobody's, and zero.
        nobody = torch.zeros(1, dtype=torch.int64, device=self.device)
        empty = torch.zeros(1, drafter.config.hidden_size, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            self._stores = [
                RowStore(
                    num_pages * PAGE_SIZE, keys.transpose(0, 1), values.transpose(0, 1), self.device
                )
                for keys, values in drafter.context_kv(empty, nobody)
            ]

    @property
    def sessions(self) -> int:
        """Sessions that hold context."""
        return len(self._sessions)

    def free(self, session: str) -> None:
        """Forget a session; an unknown one is nothing to do."""
        held = self._sessions.pop(session, None)
        if held is not None:
            self._pages.release(held.pages)

    @torch.inference_mode()
    def run(self, works: Seq[DraftWork]) -> tuple[list[BlockProposal], list[ResyncRequest]]:
        """Ingest features, then draft a block for each work that wants one.

        A work whose features leave a gap after what its session holds is answered with a resync
        request for that session, and concerns no other.
        """
        ready: list[DraftWork] = []
        resyncs: list[ResyncRequest] = []
        for work in works:
            have = self._ingest(work)
            if have is not None:
                resyncs.append(ResyncRequest(work.fence.session, work.fence.epoch, have))
            elif work.block_size > 0 and self._current(work):
                ready.append(work)
        proposals: list[BlockProposal] = []
        for size in sorted({w.block_size for w in ready}):
            proposals.extend(self._draft([w for w in ready if w.block_size == size], size))
        return proposals, resyncs

    def _ingest(self, work: DraftWork) -> int | None:
        """Store a work's features; the length held, if they do not connect to it."""
        fence = work.fence
        session = self._sessions.get(fence.session)
        if session is not None and session.epoch != fence.epoch:
            self.free(fence.session)  # the request lives on another verifier now: start over
            session = None
        have = 0 if session is None else session.length
        end = work.feature_start + len(work.features)
        # A block needs features of all committed tokens but the anchor, no fewer.
        if work.feature_start > have or (work.block_size and end != fence.committed_len - 1):
            return have
        if session is None:
            session = _Session(fence.epoch, [], torch.empty(0, dtype=torch.int64), 0)
            self._sessions[fence.session] = session
        self._sessions.move_to_end(fence.session)
        if not self._grow(session, fence.session, end):
            self.free(fence.session)
            return 0
        if len(work.features):
            positions = torch.arange(work.feature_start, end, device=self.device)
            features = work.features.to(self.device, self.dtype)
            slots = session.slots[work.feature_start : end]
            for layer, (keys, values) in enumerate(self.drafter.context_kv(features, positions)):
                self._stores[layer].write(keys.transpose(0, 1), values.transpose(0, 1), slots)
        session.length = max(session.length, end)
        return None

    def _current(self, work: DraftWork) -> bool:
        """Whether the session is where the work thinks it is; a stale work wants no block."""
        session = self._sessions.get(work.fence.session)
        return session is not None and session.length == work.fence.committed_len - 1

    def _grow(self, session: _Session, name: str, length: int) -> bool:
        """Give a session pages for `length` positions, from idle sessions if need be."""
        need = pages_for(length) - len(session.pages)
        if need <= 0:
            return True
        while self._pages.free < need:
            idle = next((s for s in self._sessions if s != name), None)
            if idle is None:
                return False
            self.free(idle)  # its owner will be asked to send the features again
        pages = self._pages.allocate(need)
        assert pages is not None
        session.pages.extend(pages)
        session.slots = torch.cat([session.slots, slots_of_pages(pages).to(self.device)])
        return True

    def _draft(self, works: list[DraftWork], size: int) -> list[BlockProposal]:
        drafter, device = self.drafter, self.device
        held = [self._sessions.get(w.fence.session) for w in works]
        # A session may have been evicted by a later one of the same batch.
        pairs = [(w, s) for w, s in zip(works, held, strict=True) if s is not None]
        if not pairs:
            return []
        works = [w for w, _ in pairs]
        starts = torch.tensor([w.fence.committed_len - 1 for w in works], device=device)
        window = drafter.config.context_window
        seen = starts if not window else starts.clamp(max=window)
        slots = torch.nn.utils.rnn.pad_sequence(
            [
                s.slots[s.length - n : s.length]
                for n, (_, s) in zip(seen.tolist(), pairs, strict=True)
            ],
            batch_first=True,
        )
        anchors = torch.tensor([w.anchor_token_id for w in works], device=device)
        hidden = drafter.hidden(
            drafter.block_tokens(anchors, size),
            starts[:, None] + torch.arange(size, device=device),
            _GatheredContext(self._stores, slots),
            _block_mask(seen, slots.shape[1], size, self.dtype),
        )
        base = drafter.base_logits(hidden)
        return self._sample_blocks(works, anchors, hidden, base)

    def _sample_blocks(
        self,
        works: list[DraftWork],
        anchors: torch.Tensor,  # [S]
        hidden: torch.Tensor,  # [S, γ, d]
        base: torch.Tensor,  # [S, γ, V_d]
    ) -> list[BlockProposal]:
        """The left-to-right loop: bias, draw, confidence (§3.1, §3.2)."""
        head, vocabulary = self.drafter.markov_head, self.drafter.draft_token_ids
        chooser = _Chooser([w.sampling for w in works], self.device)
        previous = anchors
        tokens, logits, ids, probs = [], [], [], []
        for k in range(base.shape[1]):
            embedded = head.embed(previous)
            step = base[:, k] + head.bias(embedded)
            logits.append(self.drafter.confidence_head(hidden[:, k], embedded))
            previous, law = chooser.choose(step, vocabulary, works, k)
            tokens.append(previous)
            if law is not None:
                ids.append(law[0])
                probs.append(law[1])
        chosen = torch.stack(tokens, 1).cpu().numpy()
        confidence = torch.sigmoid(torch.stack(logits, 1).float()).cpu().numpy()
        candidate_ids = torch.stack(ids, 1).cpu().numpy() if ids else None
        candidate_probs = torch.stack(probs, 1).cpu().numpy() if probs else None
        out = []
        for s, work in enumerate(works):
            sparse = chooser.needs_law[s] and candidate_ids is not None
            out.append(
                BlockProposal(
                    fence=work.fence,
                    token_ids=chosen[s],
                    confidences=confidence[s].astype(np.float32),
                    candidate_ids=candidate_ids[s]
                    if sparse and candidate_ids is not None
                    else None,
                    candidate_probs=(
                        candidate_probs[s] if sparse and candidate_probs is not None else None
                    ),
                )
            )
        return out


class _Chooser:
    """Draws the draft token of each session by its own sampling rules."""

    def __init__(self, sampling: list[SamplingParams], device: torch.device) -> None:
        self.greedy = torch.tensor([p.greedy for p in sampling], device=device)
        self.coupled = [p.mode is VerifyMode.COUPLED and not p.greedy for p in sampling]
        self.needs_law = [p.mode is VerifyMode.REJECTION and not p.greedy for p in sampling]
        self._all_greedy = all(p.greedy for p in sampling)
        self._temperature = torch.tensor(
            [1.0 if p.greedy else p.temperature for p in sampling], device=device
        )
        self._top_k = torch.tensor([p.top_k for p in sampling], device=device)
        self._top_p = torch.tensor([p.top_p for p in sampling], device=device)
        self._device = device

    def choose(
        self,
        logits: torch.Tensor,  # [S, V_d]
        vocabulary: torch.Tensor,  # [V_d]
        works: list[DraftWork],
        k: int,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Token ids [S], and the law (ids, probs) [S, K] where some session is not greedy."""
        best = vocabulary[logits.argmax(dim=-1)]
        if self._all_greedy:
            return best, None
        ids, probs = proposal_law(logits, CANDIDATES, self._temperature, self._top_k, self._top_p)
        ids = vocabulary[ids]
        drawn = self._draw(ids, probs, works, k)
        return torch.where(self.greedy, best, drawn), (ids, probs)

    def _draw(
        self, ids: torch.Tensor, probs: torch.Tensor, works: list[DraftWork], k: int
    ) -> torch.Tensor:
        keys = []
        for work, coupled in zip(works, self.coupled, strict=True):
            fence, seed = work.fence, work.sampling.seed
            position = fence.committed_len + k
            if coupled:
                keys.append(draw_key(seed, Stream.COUPLED, position))
            else:
                keys.append(draw_key(seed, Stream.DRAFT, fence.epoch, fence.round, position))
        words = key_tensor(keys, self._device)
        index = sample(probs, uniform(words))
        if any(self.coupled):
            noisy = torch.log(probs.double()) + gumbel(words, ids)
            index = torch.where(
                torch.tensor(self.coupled, device=self._device), noisy.argmax(dim=-1), index
            )
        return ids.gather(1, index[:, None])[:, 0]


def _block_mask(
    lengths: torch.Tensor, longest: int, size: int, dtype: torch.dtype
) -> torch.Tensor:  # [S, 1, γ, longest + γ]
    """Context up to each session's length is seen, and all of the block."""
    hidden = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    hidden = torch.cat([hidden, hidden.new_zeros(len(lengths), size)], dim=1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    mask.masked_fill_(hidden, float("-inf"))
    return mask[:, None, None].expand(-1, 1, size, -1)
