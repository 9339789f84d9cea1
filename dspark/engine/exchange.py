"""A verifier's dealings with its drafter: committed tokens out, by feature or by id, blocks in.

A block that is under way belongs to one request, which takes no part in steps until it has come or
its deadline has passed; what others do meanwhile is the engine's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch

from dspark.engine.draft_link import DraftLink, DraftReplies
from dspark.engine.features import FeatureStore
from dspark.engine.sequence import Sequence
from dspark.types import BlockProposal, DraftWork, IntArray

# While no blocks are wanted but soon will be, context is sent ahead; not row by row, which would
# cost as much as drafting, nor before it must be: most requests end before blocks are wanted again.
_LEAD = 8  # rounds
_LUMP_ROWS = 64


class DraftExchange:
    """Belongs to one engine, and to its thread."""

    def __init__(self, link: DraftLink, vocab_size: int, context_window: int) -> None:
        self._link = link
        self._vocab_size = vocab_size
        self._window = context_window  # features before it are not missed; 0: all are
        self.asked = self.missed = 0  # blocks since the start; of those, late ones

    @property
    def available(self) -> bool:
        """Whether blocks can be asked for now."""
        return self._link.available

    @property
    def latency_ms(self) -> float:
        """How long blocks take to come; 0 where nothing else could be done meanwhile."""
        return self._link.latency_s * 1e3

    def free(self, session: str) -> None:
        """Forget a session."""
        self._link.free([session])

    def receive(
        self,
        running: dict[str, Sequence],
        patience: Callable[[list[Sequence]], float],  # seconds to wait for those under way
    ) -> float:
        """Match replies to the requests that want them; returns the milliseconds waited.

        Anything stale is dropped. Requests whose block is overdue go on without.
        """
        started = time.perf_counter()
        wait_s, waited = 0.0, False
        while True:
            self._take(running, self._link.collect(wait_s))
            under_way = [s for s in running.values() if s.wanted_block is not None]
            overdue = [s for s in under_way if self._left_s(s) <= 0.0]
            for sequence in overdue:
                sequence.wanted_block = None
            if overdue:
                self.missed += len(overdue)
                self._link.missed([sequence.session for sequence in overdue])
                under_way = [s for s in under_way if s.wanted_block is not None]
            if not under_way:
                break
            wait_s = min(patience(under_way), min(map(self._left_s, under_way)))
            if wait_s <= 0.0:
                break
            waited = True
        return (time.perf_counter() - started) * 1e3 if waited else 0.0

    def _left_s(self, sequence: Sequence) -> float:
        return sequence.asked_at + self._link.deadline_s - time.monotonic()

    def _take(self, running: dict[str, Sequence], replies: DraftReplies) -> None:
        proposals = replies.proposals
        known = self._known([proposal.token_ids for proposal in proposals])
        for proposal in proposals:
            sequence = running.get(proposal.fence.session)
            if sequence is None or sequence.wanted_block != proposal.fence:
                continue
            proposal = _cut(proposal, sequence.remaining - 1)
            if self._fits(proposal, sequence) and (known or self._known([proposal.token_ids])):
                sequence.proposal = proposal
        for resync in replies.resyncs:
            sequence = running.get(resync.session)
            if sequence is not None and sequence.request.epoch == resync.epoch:
                sequence.sent_features = min(sequence.sent_features, resync.have_len)
        for sequence in running.values():
            if sequence.wanted_block not in replies.pending:
                sequence.wanted_block = None

    def _fits(self, proposal: BlockProposal, sequence: Sequence) -> bool:
        """Whether there is room for a block, and its law with it."""
        needs_law = sequence.request.sampling.needs_law
        return 0 < len(proposal.token_ids) < sequence.remaining and not (
            needs_law and proposal.candidate_ids is None
        )

    def _known(self, blocks: Seq[IntArray]) -> bool:
        """Whether all these tokens are ones that the target knows."""
        if not blocks:
            return True
        tokens = np.concatenate(blocks)
        return not len(tokens) or (int(tokens.min()) >= 0 and int(tokens.max()) < self._vocab_size)

    def ask(
        self,
        sequences: Seq[Sequence],  # whose features are to flow
        features: FeatureStore | None,  # None: the drafter reads token ids
        sizes: Seq[int],  # draft tokens wanted for each; 0: no block
        *,
        rest: int = 0,  # rounds until blocks are wanted again
    ) -> bool:
        """Send new features, of prompts as they are computed, and ask for blocks of use.

        Returns whether any block was asked for.
        """
        most = max(sizes, default=0)
        if not most and not self._flows(sequences, rest):
            return False
        pieces: list[tuple[Sequence, int, int, int]] = []  # whose features, start, end, block size
        room = self._link.catch_up_rows
        for sequence, wanted in zip(sequences, sizes, strict=True):
            useful = sequence.remaining - 1  # tokens that a block can bring
            if sequence.finish_reason or not sequence.computed or useful <= 0:
                continue
            start = max(sequence.sent_features, self._seen_from(sequence))
            # What one round brings always goes out, or those who lag would never catch up.
            end = max(start, min(sequence.computed, start + max(room, most + 1)))
            complete = end == sequence.computed and sequence.decoding
            size = wanted if complete else 0
            if features is None:
                size = min(size, useful)  # each token is a pass of such a drafter
            if size or (end > start and wanted) or end - start >= _LUMP_ROWS:
                room = max(0, room - (end - start))
                pieces.append((sequence, start, end, size))
        if pieces:
            parts: Iterable[torch.Tensor | None] = [None] * len(pieces)
            if features is not None:
                # one look-up for all, since on a GPU each costs as much as many rows
                slots = np.concatenate([one.slots(start, end) for one, start, end, _ in pieces])
                rows = features.rows(torch.from_numpy(slots))
                parts = rows.split([end - start for _, start, end, _ in pieces])
            works = [self._work(*piece, part) for piece, part in zip(pieces, parts, strict=True)]
            self._link.submit(works)
        return any(size for *_, size in pieces)

    def _flows(self, sequences: Collection[Sequence], rest: int) -> bool:
        """Whether to send context although no blocks are wanted: as late as it will do."""
        if 0 < self._window <= _LUMP_ROWS:
            return False  # it has all passed when it is wanted
        lacking = sum(
            max(0, s.computed - max(s.sent_features, self._seen_from(s))) for s in sequences
        )
        return rest <= self.lead(lacking)

    def lead(self, lacking: int) -> int:
        """Rounds before blocks are wanted again, from which on context that lacks is sent."""
        return _LEAD + lacking // self._link.catch_up_rows

    def _seen_from(self, sequence: Sequence) -> int:
        """The first position that any coming block sees."""
        return max(0, len(sequence.tokens) - 1 - self._window) if self._window else 0

    def _work(
        self, sequence: Sequence, start: int, end: int, size: int, features: torch.Tensor | None
    ) -> DraftWork:
        fence = sequence.fence()
        sequence.sent_features = end
        if size:
            sequence.wanted_block, sequence.asked_at = fence, time.monotonic()
            self.asked += 1
        token_ids = None
        if features is None:
            features = torch.zeros(0, 0)
            token_ids = torch.tensor(sequence.tokens[start:end], dtype=torch.int64)
        return DraftWork(
            fence=fence,
            feature_start=start,
            features=features,
            anchor_token_id=sequence.tokens[-1],
            block_size=size,
            sampling=sequence.request.sampling,
            token_ids=token_ids,
        )


def _cut(proposal: BlockProposal, length: int) -> BlockProposal:
    """The beginning of a block, should it be longer.

    Blocks of one length are one pass of a drafter, and what others near the end of their texts have
    use for must not change anybody's: so all are asked for alike, and cut here.
    """
    if len(proposal.token_ids) <= length:
        return proposal
    ids, probs = proposal.candidate_ids, proposal.candidate_probs
    return replace(
        proposal,
        token_ids=proposal.token_ids[:length],
        confidences=proposal.confidences[:length],
        candidate_ids=None if ids is None else ids[:length],
        candidate_probs=None if probs is None else probs[:length],
    )
