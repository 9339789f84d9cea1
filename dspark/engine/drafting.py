"""The draft side: sessions of context keys and values, and blocks drafted for many at once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from dspark.decoding.drawing import INDEPENDENT, DrawnBlocks, DrawRules
from dspark.engine.pages import PagePool
from dspark.engine.sequence import pages_for
from dspark.kernels.attention_plan import PAGE_SIZE, Pages, plan_attention
from dspark.kernels.cpu import operators
from dspark.kernels.transfer import to_device, to_host
from dspark.models.draft_forward import draft_forward
from dspark.models.drafter import DSparkDrafter
from dspark.models.kv_cache import PagedKVCache
from dspark.types import BlockProposal, DraftWork, Fence, ResyncRequest, SamplingParams

log = logging.getLogger(__name__)

CANDIDATES = 64  # K: entries of a sparse proposal law


@dataclass(slots=True, eq=False)
class _Session:
    epoch: int
    pages: Pages  # of positions 0 on; 0 where no context is held
    begin: int  # context is known from here
    length: int  # up to here

    @property
    def held(self) -> list[int]:
        return [page for page in self.pages.tolist() if page]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Context rows that are to be written."""

    name: str
    session: _Session
    features: torch.Tensor  # [n, d]
    start: int


@dataclass(frozen=True, slots=True)
class _Draft:
    """Blocks of one size, on the device."""

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
                token_ids=token_ids[s],
                confidences=confidences[s],
                candidate_ids=ids[s] if kind == INDEPENDENT else None,
                candidate_probs=probs[s] if kind == INDEPENDENT else None,
            )
            for s, (work, kind) in enumerate(zip(self.works, self.kinds, strict=True))
        ]


class DraftEngine:
    """Drafts blocks. Not thread-safe: one thread owns it."""

    def __init__(self, drafter: DSparkDrafter, num_pages: int) -> None:
        """`drafter` is frozen and has the type and device that it runs in."""
        self.config = drafter.config
        self._dtype, self._device = drafter.norm.weight.dtype, drafter.norm.weight.device
        self._drafter, self._forward = drafter, draft_forward(drafter)
        self._pool = PagePool(num_pages)
        self._kv = PagedKVCache(num_pages, self._device)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # least recently used first
        self._trained_length = drafter.config.trained_length  # not warned about yet; 0: it was

    @property
    def sessions(self) -> int:
        """Sessions that hold context."""
        return len(self._sessions)

    def warm_up(self) -> None:
        """Pay for first uses, the cache's memory above all, before the first work comes."""
        features = torch.zeros(1, self.config.hidden_size, dtype=self._dtype)
        work = DraftWork(
            fence=Fence("", 0, 0, 2),
            feature_start=0,
            features=features,
            anchor_token_id=0,
            block_size=self.config.block_size,
            sampling=SamplingParams(temperature=0.0),
        )
        self.run([work])
        self.free("")

    def free(self, session: str) -> None:
        """Forget a session; an unknown one is nothing to do."""
        held = self._sessions.pop(session, None)
        if held is not None:
            self._pool.release(held.held)

    def check_pages(self) -> None:
        """RuntimeError if a page is lost or held twice."""
        self._pool.check(session.held for session in self._sessions.values())

    @torch.inference_mode()
    def run(self, works: Seq[DraftWork]) -> tuple[list[BlockProposal], list[ResyncRequest]]:
        """Ingest features, then draft a block for each work that wants one.

        A work whose features leave a gap after what its session holds is answered with a resync
        request for that session, and concerns no other.
        """
        operators.spread_threads()
        ready: list[DraftWork] = []
        resyncs: list[ResyncRequest] = []
        rows: list[_Rows] = []
        for work in works:
            have = self._ingest(work, rows)
            if have is not None:
                resyncs.append(ResyncRequest(work.fence.session, work.fence.epoch, have))
            elif work.block_size > 0:
                ready.append(work)
        self._write(rows)
        drafts = [self._draft(own, size) for size, own in sorted(self._current(ready).items())]
        arrived = iter(to_host([tensor for draft in drafts for tensor in draft.drawn.tensors]))
        proposals = [
            proposal
            for draft in drafts
            for proposal in draft.proposals(*islice(arrived, len(draft.drawn.tensors)))
        ]
        return proposals, resyncs

    def _ingest(self, work: DraftWork, rows: list[_Rows]) -> int | None:
        """Take in a work's features; the length held, if they do not connect to it."""
        fence = work.fence
        session = self._sessions.get(fence.session)
        if session is not None and session.epoch != fence.epoch:
            self.free(fence.session)  # the request lives on another verifier now: start over
            session = None
        start, end = work.feature_start, work.feature_start + len(work.features)
        have = 0 if session is None else session.length
        length = max(have, end)
        seen_from = self._seen_from(length)
        if session is None or start > have:
            begin = start  # what was held before a gap is of no use
        else:
            begin = min(start, session.begin) if end >= session.begin else session.begin
        if work.block_size:
            # Features of all that the block sees, and of all committed tokens but the anchor.
            if begin > seen_from:
                return have if start > have else 0
            if end != fence.committed_len - 1:
                return have
        elif begin and not self.config.context_window:
            return have
        if session is None:
            session = _Session(fence.epoch, np.zeros(0, dtype=np.int32), 0, 0)
            self._sessions[fence.session] = session
        self._sessions.move_to_end(fence.session)
        block = self.config.rows(work.block_size) if work.block_size else 0
        if 0 < self._trained_length < length + block:
            log.warning(
                "a session of %d tokens is past the %d positions that the drafter was trained for "
                "(max_position_embeddings): less may be accepted from there on",
                length + block,
                self._trained_length,
            )
            self._trained_length = 0
        if not self._hold(session, fence.session, max(begin, seen_from), length + block):
            self.free(fence.session)
            return 0
        first = max(start, seen_from)
        if end > first:
            rows.append(_Rows(fence.session, session, work.features[first - start :], first))
        session.begin, session.length = begin, length
        return None

    def _seen_from(self, length: int) -> int:
        """The first position that blocks after `length` see."""
        window = self.config.context_window
        return max(0, length - window) if window else 0

    def _hold(self, session: _Session, name: str, begin: int, end: int) -> bool:
        """Have pages for positions begin..end-1, from idle sessions if need be, and none before."""
        first, last = begin // PAGE_SIZE, pages_for(end)
        passed = session.pages[:first]
        self._pool.release(page for page in passed.tolist() if page)
        passed[:] = 0
        if last > len(session.pages):
            session.pages = np.pad(session.pages, (0, last - len(session.pages)))
        wanted = first + np.flatnonzero(session.pages[first:last] == 0)
        while self._pool.free < len(wanted):
            idle = next((s for s in self._sessions if s != name), None)
            if idle is None:
                return False
            self.free(idle)  # its owner will be asked to send the features again
        pages = self._pool.allocate(len(wanted))
        assert pages is not None
        session.pages[wanted] = pages
        return True

    def _write(self, rows: list[_Rows]) -> None:
        # A session may have been evicted by a later one of the same batch.
        rows = [row for row in rows if self._sessions.get(row.name) is row.session]
        if not rows:
            return
        features = torch.cat([row.features for row in rows])
        where = plan_attention(
            [row.session.pages for row in rows],
            [row.start for row in rows],
            [len(row.features) for row in rows],
            self._device,
        )
        (features,) = to_device([features], self._device)
        placed = where.placed
        features = features.to(self._device, self._dtype)
        self._forward.write_context(features, placed.positions, placed.slots, self._kv)

    def _current(self, works: Seq[DraftWork]) -> dict[int, list[DraftWork]]:
        """By block size, works whose session is where they think it is; a stale one wants none."""
        of: dict[int, list[DraftWork]] = {}
        for work in works:
            session = self._sessions.get(work.fence.session)
            if session is not None and session.length == work.fence.committed_len - 1:
                of.setdefault(work.block_size, []).append(work)
        return of

    def _draft(self, works: list[DraftWork], size: int) -> _Draft:
        sessions = [self._sessions[work.fence.session] for work in works]
        window, rows = self.config.context_window, self.config.rows(size)
        plan = plan_attention(
            [session.pages for session in sessions],
            [session.length for session in sessions],
            [rows] * len(works),
            self._device,
            block=True,
            window=window + rows if window else None,
        )
        anchors = torch.tensor([w.anchor_token_id for w in works])
        tokens = self._drafter.block_tokens(anchors, size)
        tokens, anchors = plan.move(tokens.flatten(), anchors)
        hidden = self._forward.hidden(tokens, plan, self._kv).view(len(works), rows, -1)
        hidden = self._drafter.predicting(hidden).contiguous()
        rules = DrawRules.of([w.fence for w in works], [w.sampling for w in works], size)
        drawn = self._forward.draw(hidden, anchors, rules, CANDIDATES)
        return _Draft(works, rules.kinds.tolist(), drawn)
