"""The thread that owns a verifier engine, so that torch never runs on an event loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from dspark.config import EngineConfig
from dspark.engine.threads import use_all_threads
from dspark.engine.verifier import VerifierEngine
from dspark.errors import DSparkError, UnavailableError
from dspark.scheduling.autoscaling.signals import Share, VerifierSignals
from dspark.scheduling.calibration import CalibrationTable
from dspark.scheduling.explanation import StepExplanation
from dspark.types import Request, StepPlan, StepReport, VerificationResult

log = logging.getLogger(__name__)

_FAILED_JOIN_S = 1.0


class EngineRunner:
    """Steps the engine while there is work; everything else goes through its inbox.

    `on_results`, `on_refused` (why, by request id) and `on_report` are called on the engine's
    thread and must not block. When a step raises, or a process is lost that the target needs, the
    engine's state is unknown: `failure` is set, `on_failure` is called once, from any thread, and
    nothing runs any more; the replica must be replaced.
    """

    def __init__(
        self,
        engine: VerifierEngine,
        *,
        on_results: Callable[[list[VerificationResult]], None],
        on_refused: Callable[[Mapping[str, DSparkError]], None],
        on_report: Callable[[StepReport], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_results, self._on_report = on_results, on_report
        self._on_refused, self._on_failure = on_refused, on_failure
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._wanting, self._missed = Share(), Share()
        self.failure: BaseException | None = None
        self._stepping_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="verifier-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._engine.on_lost(self._fail)  # also while a step waits for what was lost
        self._thread.start()

    def stop(self) -> None:
        """Finish the step under way and end the thread."""
        self._post(self._mark_stopping)
        # One that failed may hang in a step for good.
        self._thread.join(None if self.failure is None else _FAILED_JOIN_S)

    def add(self, request: Request) -> Future[None]:
        """Queue a request; the future fails with what the engine's `add` raises."""

        def put() -> None:
            if self.failure is not None:
                raise UnavailableError(f"this verifier's engine failed: {self.failure}")
            self._engine.add(request)

        return self._answered(put)

    def reconfigure(self, config: EngineConfig) -> Future[None]:
        """Go on by these settings before the next step; the future fails as the engine's does."""
        return self._answered(lambda: self._engine.reconfigure(config))

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step."""

        def drop() -> None:
            if self.failure is None:
                self._engine.abort(request_id)

        self._post(drop)

    def dismiss(self, error: DSparkError) -> None:
        """Refuse what waits and has not begun."""

        def refuse() -> None:
            if self.failure is None:
                self._refuse(dict.fromkeys(self._engine.dismiss(), error))

        self._post(refuse)

    def set_plan(self, plan: StepPlan) -> None:
        """Follow `plan` from the next step on."""
        self._post(lambda: self._engine.set_plan(plan))

    def set_calibration(self, table: CalibrationTable) -> None:
        """Offer a table to the engine before the next step."""
        self._post(lambda: self._engine.calibration.offer(table))

    def check(self) -> None:
        """UnavailableError if the engine failed, or hangs in a step; never waits."""
        if self.failure is not None:
            raise UnavailableError(f"the engine failed: {self.failure}")
        since, most_s = self._stepping_since, self.config.max_step_s
        if since is not None and 0 < most_s < time.monotonic() - since:
            raise UnavailableError(
                f"the engine has been at one step for more than {most_s:g} s, and may never end "
                "it: replace the replica, or raise engine.max_step_s if its steps take so long"
            )

    @property
    def config(self) -> EngineConfig:
        """The engine's settings, as they stand; read without waiting."""
        return self._engine.config

    @property
    def load(self) -> tuple[int, int, int, int]:
        """The engine's load, as it stands; read without waiting."""
        return self._engine.load

    @property
    def retry_after_s(self) -> float:
        """When somebody who was turned away had better come back; read without waiting."""
        return self._engine.retry_after_s

    def explain(self, count: int) -> list[StepExplanation]:
        """The engine's last steps; read without waiting, also after it failed."""
        return self._engine.explain(count)

    def signals(self) -> VerifierSignals:
        """For autoscaling. Shares are of what happened since the last call: there is one caller."""
        engine, (running, waiting, free, total) = self._engine, self._engine.load
        counts = engine.draft_counts
        return VerifierSignals(
            kv_pressure=1.0 - free / total,
            queue_age_s=engine.queue_age_s,
            floor_attainment=engine.floor_attainment,
            requests=running + waiting,
            drafts_wanted=self._wanting.look(counts.wanting, counts.rounds),
            blocks_missed=self._missed.look(counts.missed, counts.blocks),
        )

    def _answered(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` on the engine's thread; the future fails with what it raises."""
        answer: Future[None] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # the caller has gone; answering would raise, and end the engine's thread
            try:
                action()
            except Exception as error:
                answer.set_exception(error)
            else:
                answer.set_result(None)

        self._post(run)
        return answer

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self.failure is None:
                self._inbox.append(action)
                self._wake.notify()
                return
        action()  # nobody reads the inbox any more

    def _refuse(self, refusals: Mapping[str, DSparkError]) -> None:
        if refusals:
            self._on_refused(refusals)

    def _mark_stopping(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        use_all_threads()
        try:
            while not self._stopping and self.failure is None:
                with self._wake:
                    self._stepping_since = None
                    self._wake.wait_for(
                        lambda: self._inbox or self._engine.has_work or self.failure is not None
                    )
                    self._stepping_since = time.monotonic()
                    actions = list(self._inbox)
                    self._inbox.clear()
                for action in actions:
                    action()
                if self._stopping or self.failure is not None or not self._engine.has_work:
                    continue
                self._refuse(self._engine.expire())
                results = self._engine.step()
                if results:
                    self._on_results(results)
                if self._engine.last_report is not None:
                    self._on_report(self._engine.last_report)
        except Exception as error:
            log.exception("the verifier's engine failed")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            if self.failure is not None:
                return
            self.failure = error
            actions = list(self._inbox)
            self._inbox.clear()
            self._wake.notify()
        for action in actions:
            action()  # whoever waits to be let in is told
        self._on_failure(error)
