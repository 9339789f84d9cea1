"""Why a step verified what it did, and what came of it: kept for the last steps, told when asked.

A step leaves references to what it was planned by and a few counts. Survivals are worked out, and
everything put into words, when somebody asks. Tokens and text are no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dspark.scheduling.planner import Plan
from dspark.scheduling.survival import ABSENT, survival_table
from dspark.types import (
    RAW_SCALES,
    FloatArray,
    Scales,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerificationResult,
)

KEPT_STEPS = 64
SHOWN_REQUESTS = 256  # of one step


class Basis(StrEnum):
    """What decided how much a step verifies. The first three are the planner's searches."""

    CAUSAL = "causal"
    RANKED = "ranked"
    GLOBAL = "global"
    WHOLE = "whole"  # blocks: the policy is fixed, or there are no step times
    NO_BLOCKS = "no_blocks"  # they were asked for, and none came that could be used
    NOT_ASKED = "not_asked"  # the draft gate wanted none, or none could be of use
    NO_DRAFTER = "no_drafter"  # and no prompt lookup
    UNWANTED = "unwanted"  # the requests asked for plain decoding
    OFF = "off"  # is the policy
    PROMPTS = "prompts"  # and nothing else in the step


@dataclass(frozen=True, slots=True)
class Planned:
    """What was decided before a step."""

    plan: StepPlan  # that was followed
    basis: Basis
    requests: int  # decoding
    # Of their blocks, [γ_r] each, raw; none where no block was here.
    confidences: Sequence[FloatArray] = ()
    greedy: Sequence[bool] = ()  # whether those requests are
    scales: Scales = RAW_SCALES
    looked_up: bool = False
    ceiling: int | None = None  # on draft tokens, from the plan or from earlier steps
    found: Plan | None = None  # None: nothing was searched for, so nothing is predicted


@dataclass(frozen=True, slots=True)
class RequestExplanation:
    """One decoding request in one step."""

    request_id: str
    survivals: tuple[float, ...]  # calibrated, of the whole block; empty: it had none
    verified: int  # of them, admitted
    accepted: int
    committed: int  # tokens


@dataclass(frozen=True, slots=True)
class StepExplanation:
    """One step of a verifier, for people."""

    step: int
    age_s: float  # since it ended
    plan_epoch: int  # 0: the verifier's own settings
    policy: VerificationPolicy
    basis: Basis
    looked_up: bool  # blocks came from the requests' own text
    ceiling: int | None  # most draft tokens that it might verify; None: all
    prompt_tokens: int  # that went along
    decoding: int  # requests in all
    requests: tuple[RequestExplanation, ...]  # the first SHOWN_REQUESTS of them
    predicted_tokens: float | None  # None: nothing was searched for
    predicted_ms: float | None  # of the round
    committed: int  # tokens of the decoding requests
    round_ms: float | None  # None: the engine rested before the step
    step_ms: float  # of the round, in the target's forward and acceptance
    draft_wait_ms: float  # of the round, waiting for blocks

    @property
    def predicted_per_s(self) -> float | None:
        """Θ as the planner saw it: tokens a second."""
        if self.predicted_tokens is None or not self.predicted_ms:
            return None
        return 1e3 * self.predicted_tokens / self.predicted_ms

    @property
    def measured_per_s(self) -> float | None:
        """Θ as it was: tokens a second of the round."""
        return 1e3 * self.committed / self.round_ms if self.round_ms else None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step leaves behind."""

    planned: Planned
    report: StepReport
    ended_at: float  # by time.perf_counter
    # Of each decoding request:
    request_ids: list[str]
    verified: list[int]
    accepted: list[int]
    committed: list[int]

    @classmethod
    def of(
        cls,
        planned: Planned,
        report: StepReport,
        ended_at: float,
        decoded: Sequence[VerificationResult],  # one for each of `planned.requests`, in order
    ) -> StepRecord:
        """The record of a finished step."""
        return cls(
            planned,
            report,
            ended_at,
            [result.request_id for result in decoded],
            [result.verified for result in decoded],
            [result.accepted for result in decoded],
            [len(result.token_ids) for result in decoded],
        )

    def explain(self) -> StepExplanation:
        """The same for people."""
        planned, report, found = self.planned, self.report, self.planned.found
        shown = min(planned.requests, SHOWN_REQUESTS)
        rows: list[tuple[float, ...]] = [()] * shown
        if planned.confidences:
            of = planned.confidences[:shown], planned.greedy[:shown]
            table = survival_table(*of, planned.scales)
            rows = [tuple(row[row > ABSENT].tolist()) for row in table]
        requests = zip(
            self.request_ids, rows, self.verified, self.accepted, self.committed, strict=False
        )
        return StepExplanation(
            step=report.step,
            age_s=time.perf_counter() - self.ended_at,
            plan_epoch=planned.plan.epoch,
            policy=planned.plan.policy,
            basis=planned.basis,
            looked_up=planned.looked_up,
            ceiling=planned.ceiling,
            prompt_tokens=report.prefill_tokens,
            decoding=planned.requests,
            requests=tuple(RequestExplanation(*request) for request in requests),
            predicted_tokens=None if found is None else found.expected,
            predicted_ms=None if found is None else found.round_ms,
            committed=report.decoded_tokens,
            round_ms=report.round_ms or None,
            step_ms=report.step_ms,
            draft_wait_ms=report.draft_wait_ms,
        )


class StepRecords:
    """The last steps. One thread adds; any may ask."""

    def __init__(self, kept: int = KEPT_STEPS) -> None:
        self._ring: list[StepRecord | None] = [None] * kept
        self._added = 0

    def add(self, record: StepRecord) -> None:
        """Keep one, and forget the oldest."""
        self._ring[self._added % len(self._ring)] = record
        self._added += 1

    def last(self, count: int) -> list[StepExplanation]:
        """Up to `count` steps, the latest last."""
        # Copied in one go: the ring may turn meanwhile.
        kept = [record for record in self._ring.copy() if record is not None]
        kept.sort(key=lambda record: record.report.step)
        return [record.explain() for record in kept[max(0, len(kept) - count) :]]
