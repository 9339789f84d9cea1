"""What a drafter holds of each request: how far its context is known, and in which pages.

Context is features of committed tokens, or the tokens themselves; a drafter reads one of the two.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dspark.engine.pages import PagePool
from dspark.kernels.attention_plan import PAGE_SIZE, Pages, pages_for
from dspark.types import DraftWork, ResyncRequest

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Session:
    """One request's context."""

    epoch: int
    pages: Pages  # of positions 0 on; 0 where no context is held
    begin: int  # context is known from here
    length: int  # up to here
    ready: tuple[int, int] = 0, 0  # from page to page all are there, and before them none

    @property
    def held(self) -> list[int]:
        """The pages that it has."""
        return [page for page in self.pages.tolist() if page]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Context rows that a work brings, which are to be written."""

    work: DraftWork
    session: Session
    context: torch.Tensor  # [n, d] features or [n] token ids; n may be 0
    start: int  # position of the first


class DraftSessions:
    """Belongs to one draft engine."""

    def __init__(
        self,
        num_pages: int,
        *,
        context_window: int,  # 0: all
        trained_length: int,  # positions; 0: not known
        rows: Callable[[int], int],  # that a block of so many draft tokens takes
    ) -> None:
        self.pool = PagePool(num_pages)
        self._window, self._rows = context_window, rows
        self._trained_length = trained_length  # not warned about yet; 0: it was
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # least recently used first

    @property
    def names(self) -> frozenset[str]:
        """Who has a session."""
        return frozenset(self._sessions)

    def free(self, name: str) -> None:
        """Forget a session; an unknown one is nothing to do."""
        held = self._sessions.pop(name, None)
        if held is not None:
            self.pool.release(held.held)

    def check_pages(self) -> None:
        """RuntimeError if a page is lost or held twice."""
        self.pool.check(session.held for session in self._sessions.values())

    def take_in(self, works: Seq[DraftWork]) -> tuple[list[Rows], list[ResyncRequest]]:
        """Rows of works that connect to what is held, and requests to those that do not.

        Afterwards there are pages for all rows and blocks.
        """
        rows: list[Rows] = []
        resyncs: list[ResyncRequest] = []
        for work in works:
            have = self._take_in(work, rows)
            if have is not None:
                resyncs.append(ResyncRequest(work.fence.session, work.fence.epoch, have))
        # A session may have been evicted by a later one of the same batch.
        return [r for r in rows if self._sessions.get(r.work.fence.session) is r.session], resyncs

    def wanting(self, rows: Seq[Rows]) -> list[Rows]:
        """Those who want a block, and whose session is where they think it is."""
        return [
            r
            for r in rows
            if r.work.block_size and r.session.length == r.work.fence.committed_len - 1
        ]

    def _take_in(self, work: DraftWork, rows: list[Rows]) -> int | None:
        """The length held, if a work's context does not connect to it."""
        fence = work.fence
        session = self._sessions.get(fence.session)
        if session is not None and session.epoch != fence.epoch:
            self.free(fence.session)  # the request lives on another verifier now: start over
            session = None
        start, end = work.feature_start, work.feature_start + len(work.context)
        have = 0 if session is None else session.length
        length = max(have, end)
        seen_from = self._seen_from(length)
        if session is None or start > have:
            begin = start  # what was held before a gap is of no use
        else:
            begin = min(start, session.begin) if end >= session.begin else session.begin
        if work.block_size:
            # Context of all that the block sees, and of all committed tokens but the anchor.
            if begin > seen_from:
                return have if start > have else 0
            if end != fence.committed_len - 1:
                return have
        elif begin and not self._window:
            return have
        if session is None:
            session = Session(fence.epoch, np.zeros(0, dtype=np.int32), 0, 0)
            self._sessions[fence.session] = session
        self._sessions.move_to_end(fence.session)
        block = self._rows(work.block_size) if work.block_size else 0
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
        first = min(max(start, seen_from), end)
        context = work.context if first == start else work.context[first - start :]
        rows.append(Rows(work, session, context, first))
        session.begin, session.length = begin, length
        return None

    def _seen_from(self, length: int) -> int:
        """The first position that blocks after `length` see."""
        return max(0, length - self._window) if self._window else 0

    def _hold(self, session: Session, name: str, begin: int, end: int) -> bool:
        """Have pages for positions begin..end-1, from idle sessions if need be, and none before."""
        first, last = begin // PAGE_SIZE, pages_for(end)
        if first == session.ready[0] and last <= session.ready[1]:
            return True  # as nearly always: a page lasts for many rounds
        passed = session.pages[:first]
        self.pool.release(page for page in passed.tolist() if page)
        passed[:] = 0
        if last > len(session.pages):
            more = np.zeros(last - len(session.pages), dtype=np.int32)
            session.pages = np.concatenate([session.pages, more])
        wanted = first + np.flatnonzero(session.pages[first:last] == 0)
        while self.pool.free < len(wanted):
            idle = next((s for s in self._sessions if s != name), None)
            if idle is None:
                return False
            self.free(idle)  # its owner will be asked to send its context again
        pages = self.pool.allocate(len(wanted))
        assert pages is not None
        session.pages[wanted] = pages
        session.ready = first, last
        return True
