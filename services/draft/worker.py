"""The thread that owns the draft engine and batches work across verifiers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dspark.engine.drafting import DraftEngine
from dspark.engine.threads import use_all_threads
from dspark.types import BlockProposal, DraftWork, ResyncRequest

log = logging.getLogger(__name__)

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
    """Runs work in arrival order, all that is waiting at once, up to `max_batch_works`.

    Sessions belong to the client (the stream) that made them: a verifier can neither see nor free
    another's, even when both name one request.
    """

    def __init__(
        self, engine: DraftEngine, max_batch_works: int, on_failure: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self._max_batch_works = max_batch_works
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[_Job | _Free | None] = queue.SimpleQueue()
        self._sessions: dict[int, set[str]] = {}
        self._thread = threading.Thread(target=self._run, name="draft-engine", daemon=True)
        self.failure: BaseException | None = None
        self.busy_s = 0.0  # spent on work since the start

    @property
    def sessions(self) -> int:
        """Sessions that hold context."""
        return self._engine.sessions

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is under way and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def submit(self, client: int, works: Sequence[DraftWork], answer: Answer) -> None:
        """Run `works`; `answer` is called on the worker's thread and must not block."""
        self._queue.put(_Job(client, works, answer))

    def free(self, client: int, sessions: Sequence[str] | None) -> None:
        """Forget sessions of a client; None forgets the client."""
        self._queue.put(_Free(client, sessions))

    def _run(self) -> None:
        use_all_threads()
        try:
            waiting: _Job | _Free | None
            carried: list[_Job | _Free | None] = []
            while True:
                waiting = carried.pop() if carried else self._queue.get()
                if waiting is None:
                    return
                if isinstance(waiting, _Free):
                    self._forget(waiting)
                    continue
                jobs, count = [waiting], len(waiting.works)
                while count < self._max_batch_works:
                    try:
                        following = self._queue.get_nowait()
                    except queue.Empty:
                        break
                    if not isinstance(following, _Job):
                        carried.append(following)  # frees keep their place in the order
                        break
                    jobs.append(following)
                    count += len(following.works)
                self._run_jobs(jobs)
        except Exception as error:
            log.exception("the draft engine failed")
            self.failure = error
            self._on_failure(error)

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
        self.busy_s += time.monotonic() - started
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


def _inside(client: int, session: str) -> str:
    return f"{client}/{session}"


def _outside(name: str) -> str:
    return name.split("/", 1)[1]


def _client_of(name: str) -> int:
    return int(name.split("/", 1)[0])
