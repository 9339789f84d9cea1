"""The thread that owns the draft engine and batches work across verifiers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dspark.engine.drafting import DraftEngine
from dspark.engine.threads import use_all_threads
from dspark.errors import UnavailableError
from dspark.scheduling.fair_queue import FairQueue
from dspark.types import BlockProposal, DraftWork, ResyncRequest

log = logging.getLogger(__name__)

_KEPT = 0.95  # of what is known of the speed, at each run

Answer = Callable[[list[BlockProposal], list[ResyncRequest]], None]


@dataclass(frozen=True, slots=True)
class _Job:
    client: int
    works: Sequence[DraftWork]
    answer: Answer


@dataclass(frozen=True, slots=True)
class _Free:
    client: int
    sessions: Sequence[str] | None  # None: all of the client's


class DraftWorker:
    """Runs what is waiting at once, up to `max_batch_works`, and lets no client starve another.

    Sessions belong to the client (the stream) that made them: a verifier can neither see nor free
    another's, even when both name one request.
    """

    def __init__(
        self, engine: DraftEngine, max_batch_works: int, on_failure: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self.max_batch_works = max_batch_works  # the next run has it as it is then
        self._on_failure = on_failure
        self._wake = threading.Condition()  # guards the next three
        self._queue: FairQueue[_Job | _Free] = FairQueue()
        self._most_waiting = 0  # works behind a run, since it was last asked
        self._stopping = False
        self._sessions: dict[int, set[str]] = {}
        self._thread = threading.Thread(target=self._run, name="draft-engine", daemon=True)
        self.failure: BaseException | None = None
        self._running_since: float | None = None
        self.busy_s = 0.0  # spent on work since the start
        self._works = self._works_s = 0.0  # done lately, and the time that they took

    @property
    def sessions(self) -> int:
        """Sessions that hold context."""
        return self._engine.sessions

    @property
    def works_per_s(self) -> float:
        """Works done lately in a second of work; 0 before the first."""
        return self._works / self._works_s if self._works_s else 0.0

    def check(self, max_run_s: float) -> None:
        """UnavailableError if the engine failed, or hangs in a run; 0: it may take for ever."""
        if self.failure is not None:
            raise UnavailableError(f"the draft engine failed: {self.failure}")
        since = self._running_since
        if since is not None and 0 < max_run_s < time.monotonic() - since:
            raise UnavailableError(
                f"the draft engine has been at one run for more than {max_run_s:g} s, and may "
                "never end it: replace the replica, or raise draft.max_run_s if its runs take so "
                "long"
            )

    def most_waiting(self) -> int:
        """The most works that waited behind a run since the last call."""
        with self._wake:
            most, self._most_waiting = self._most_waiting, self._queue.works
            return most

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is under way and what waits, and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, client: int, works: Sequence[DraftWork], answer: Answer) -> None:
        """Run `works`; `answer` is called on the worker's thread and must not block."""
        with self._wake:
            self._queue.put(client, _Job(client, works, answer), max(1, len(works)))
            self._wake.notify()

    def free(self, client: int, sessions: Sequence[str] | None) -> None:
        """Forget sessions of a client, after the work before; None forgets the client, at once."""
        with self._wake:
            if sessions is None:
                self._queue.drop(client)
            self._queue.put(client, _Free(client, sessions), 0)
            self._wake.notify()

    def _run(self) -> None:
        use_all_threads()
        try:
            while run := self._next_run():
                jobs = [one for one in run if isinstance(one, _Job)]
                before, after = _frees(run)
                for free in before:
                    self._forget(free)
                if jobs:
                    self._run_jobs(jobs)
                for free in after:
                    self._forget(free)
        except Exception as error:
            log.exception("the draft engine failed")
            self.failure = error
            self._on_failure(error)

    def _next_run(self) -> list[_Job | _Free]:
        """Empty when it is time to stop."""
        with self._wake:
            self._running_since = None
            self._wake.wait_for(lambda: self._queue or self._stopping)
            self._running_since = time.monotonic()
            run = self._queue.take(self.max_batch_works)
            self._most_waiting = max(self._most_waiting, self._queue.works)
            return run

    def _run_jobs(self, jobs: list[_Job]) -> None:
        works: list[DraftWork] = []
        for job in jobs:
            for work in job.works:
                session = work.fence.session
                self._sessions.setdefault(job.client, set()).add(session)
                inside = replace(work.fence, session=_inside(job.client, session))
                works.append(replace(work, fence=inside))
        started = time.monotonic()
        proposals, resyncs = self._engine.run(works)
        took = time.monotonic() - started
        self.busy_s += took
        self._works = _KEPT * self._works + len(works)
        self._works_s = _KEPT * self._works_s + took
        for job in jobs:
            job.answer(
                [
                    replace(p, fence=replace(p.fence, session=_outside(p.fence.session)))
                    for p in proposals
                    if _client_of(p.fence.session) == job.client
                ],
                [
                    replace(r, session=_outside(r.session))
                    for r in resyncs
                    if _client_of(r.session) == job.client
                ],
            )
            # A client with two jobs in one run gets all its answers with the first.
            proposals = [p for p in proposals if _client_of(p.fence.session) != job.client]
            resyncs = [r for r in resyncs if _client_of(r.session) != job.client]

    def _forget(self, free: _Free) -> None:
        known = self._sessions.get(free.client, set())
        gone = set(known) if free.sessions is None else known & set(free.sessions)
        for session in gone:
            self._engine.free(_inside(free.client, session))
        known -= gone
        if not known:
            self._sessions.pop(free.client, None)


def _frees(run: Sequence[_Job | _Free]) -> tuple[list[_Free], list[_Free]]:
    """Those to be done before the run's jobs, and those after: behind a job of their client."""
    before, after, begun = list[_Free](), list[_Free](), set[int]()
    for one in run:
        if isinstance(one, _Job):
            begun.add(one.client)
        else:
            (after if one.client in begun else before).append(one)
    return before, after


def _inside(client: int, session: str) -> str:
    return f"{client}/{session}"


def _outside(name: str) -> str:
    return name.split("/", 1)[1]


def _client_of(name: str) -> int:
    return int(name.split("/", 1)[0])
