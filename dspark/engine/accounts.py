"""What an engine tells of its steps: a report of each, and why it did what it did."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from dspark.engine.roster import Roster
from dspark.engine.rounds import Round
from dspark.engine.speculation import Speculation
from dspark.scheduling.explanation import StepExplanation, StepRecord, StepRecords
from dspark.scheduling.outcomes import OutcomeSample
from dspark.types import StepReport, VerificationResult


class StepAccounts:
    """Belongs to one engine."""

    def __init__(self, block_size: int) -> None:
        self._sample = OutcomeSample(block_size)
        self._records = StepRecords()
        self._steps = 0
        self.last_report: StepReport | None = None

    def explain(self, count: int) -> list[StepExplanation]:
        """The last steps, up to `count` of KEPT_STEPS, the latest last. For any thread."""
        return self._records.last(count)

    def add(
        self,
        this: Round,
        results: Seq[VerificationResult],
        ended: float,  # by time.perf_counter
        speculation: Speculation,
        roster: Roster,
        *,
        drafted: bool,  # the blocks were, and not looked up
    ) -> None:
        """Report a step."""
        if drafted:
            self._sample.add(results)
        self._steps += 1
        width, planned, calibration = (
            speculation.block_size,
            speculation.planned,
            speculation.calibration,
        )
        decoded = results[len(results) - planned.requests :]  # behind those of prompts
        self.last_report = StepReport(
            step=self._steps,
            step_ms=this.step_ms,
            draft_wait_ms=this.waited_ms,
            decode_requests=this.requests,
            waiting_requests=len(roster.waiting),
            tokens=this.tokens,
            prefill_tokens=this.prefill,
            drafted=sum(result.drafted for result in results),
            verified_by_position=_by_position([r.verified for r in results], width),
            accepted_by_position=_by_position([r.accepted for r in results], width),
            committed=sum(len(result.token_ids) for result in results),
            free_pages=roster.pages.free,
            total_pages=roster.pages.total,
            calibration_epoch=calibration.epoch,
            calibrations_refused=calibration.refused,
            outcomes=self._sample.take(calibration.scales),
            classes=speculation.classes.loads(roster.running.values()),
            predicted_tokens=0.0 if planned.found is None else planned.found.expected,
            predicted_ms=0.0 if planned.found is None else planned.found.round_ms,
            decoded_tokens=sum(len(result.token_ids) for result in decoded),
            round_ms=this.round_ms or 0.0,
        )
        self._records.add(StepRecord.of(planned, self.last_report, ended, decoded))


def _by_position(lengths: list[int], width: int) -> tuple[int, ...]:
    """How many requests reached each block position."""
    reached = np.array(lengths, dtype=np.int64)[:, None] > np.arange(width)
    return tuple(reached.sum(axis=0).tolist())
