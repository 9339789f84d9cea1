"""How much of what was drafted a step verifies, and what was promised of it (design §4).

It sees confidences and never tokens; dspark.scheduling.planner says which searches bias nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from dspark.config import EngineConfig
from dspark.engine.classes import ServiceClasses
from dspark.engine.judges import Judge, Judges
from dspark.engine.sequence import Sequence
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.explanation import Basis, Planned
from dspark.scheduling.planner import Plan, Search, plan_lengths, reserve
from dspark.scheduling.recent import Recent
from dspark.scheduling.survival import survival_table
from dspark.types import (
    RAW_SCALES,
    DoubleArray,
    FloatArray,
    StepPlan,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

_NO_BLOCK = np.zeros(0, dtype=np.float32)
_MEMORY = 15  # steps


@dataclass(frozen=True, slots=True)
class _AtHand:
    """Blocks that a step may verify, and by what is decided how much of them."""

    planned: Planned  # but for what is found
    judge: Judge
    decoding: Seq[Sequence]
    sizes: list[int]  # of their blocks
    asked: int  # length of the blocks that were asked for; 0: none were
    alone: bool  # no other requests run, whose blocks are under way
    block_size: int
    prefill: int
    search: Search

    @property
    def whole(self) -> bool:
        """Whether all are verified, by what earlier rounds say."""
        return self.search == "ranked" and (self.planned.ceiling or 0) >= sum(self.sizes)

    def rounds_ms(self, least: int, most: int) -> DoubleArray:
        """Of rounds with so many target tokens."""
        # Waiting is over when a step is planned; but a round that waited is worth more tokens.
        return self.judge.times.rounds_ms(
            len(self.decoding), least, most, self.block_size, waits=self.alone
        )


def freest_search(sequences: Seq[Sequence]) -> Search:
    """The freest that biases nothing: a sampled token may depend on what is verified, or not."""
    samplings = (s.request.sampling for s in sequences)
    unbiased = all(s.greedy or s.mode is VerifyMode.COUPLED for s in samplings)
    return "global" if unbiased else "causal"


class Verification:
    """One verifier's."""

    def __init__(
        self,
        config: EngineConfig,
        judges: Judges,
        classes: ServiceClasses,
        calibration: CalibrationInUse,
    ) -> None:
        self.calibration = calibration
        self.planned: Planned | None = None  # the last step, for those who ask why
        self._config, self._judges, self._classes = config, judges, classes
        # Whose draft tokens this step verifies, and how many of them should be accepted.
        self._promised: dict[str, tuple[Sequence, float]] = {}
        self._unstudied: _AtHand | None = None  # blocks of this step
        self._took_ms = Recent(_MEMORY)  # to find how much of a step's blocks to verify

    def lengths(
        self,
        decoding: Seq[Sequence],
        plan: StepPlan,
        *,
        prefill: int,  # prompt tokens in the same step
        asked: int,  # length of the blocks that were asked for; 0: none were
        alone: bool,  # no other requests run, whose blocks are under way
        block_size: int,
        why_none: Callable[[], Basis],  # there are no blocks
    ) -> list[int]:
        """Draft tokens to verify, for each."""
        blocks = [s.proposal for s in decoding]
        sizes = [0 if block is None else len(block.token_ids) for block in blocks]
        if plan.policy is VerificationPolicy.OFF or not any(sizes):
            self.planned = Planned(plan, why_none(), len(decoding))
            return [0] * len(decoding)
        judge, looks_up = self._judges.now, self._judges.looks_up
        confidences = [_NO_BLOCK if block is None else block.confidences for block in blocks]
        # Looked up blocks come with measured chances, and the gate has seen them already.
        scales = RAW_SCALES if looks_up else self.calibration.scales
        greedy = [s.request.sampling.greedy for s in decoding]
        of = len(decoding), confidences, greedy, scales, looks_up
        if plan.policy is VerificationPolicy.FIXED or judge is None:
            self.planned = Planned(plan, Basis.WHOLE, *of)
            return sizes
        size = asked or block_size
        search, ceiling = freest_search(decoding), plan.max_draft_tokens or None
        # By earlier rounds, so before those at hand are recorded.
        capacity = judge.gate.capacity(len(decoding), size, prefill)
        sampled = search == "causal" and self._asynchronous
        if capacity is not None and (capacity >= sum(sizes) or sampled):
            search, ceiling = "ranked", min(capacity, ceiling or capacity)
        self.planned = Planned(plan, Basis(search), *of, ceiling)
        at_hand = _AtHand(
            planned=self.planned,
            judge=judge,
            decoding=decoding,
            sizes=sizes,
            asked=asked,
            alone=alone,
            block_size=size,
            prefill=prefill,
            search=search,
        )
        if at_hand.whole:
            self._unstudied = at_hand  # all are verified, whatever is expected of them
            return sizes
        began = time.perf_counter()
        found = self._study(at_hand)
        self._took_ms.add((time.perf_counter() - began) * 1e3)
        judge.gate.planning_ms = self._took_ms.usual or 0.0
        return found.lengths

    def study(self) -> None:
        """Look at blocks that are verified whole: what is expected of them can wait until now.

        To be called while the step is under way, before it is known what comes of them.
        """
        at_hand, self._unstudied = self._unstudied, None
        if at_hand is not None:
            self._study(at_hand)

    def _study(self, at_hand: _AtHand) -> Plan:
        planned, judge, decoding = at_hand.planned, at_hand.judge, at_hand.decoding
        survivals = survival_table(planned.confidences, planned.greedy, planned.scales)
        if not planned.looked_up:
            _see(judge.gate, decoding, survivals, at_hand.sizes, at_hand.asked)
        found = self._whole(at_hand, survivals) if at_hand.whole else self._part(at_hand, survivals)
        self._promised = {
            sequence.request.id: (sequence, promised)
            for sequence, promised in zip(decoding, found.promised, strict=True)
            if promised
        }
        self.planned = replace(planned, found=found)
        return found

    def _whole(self, at_hand: _AtHand, survivals: FloatArray) -> Plan:
        """All are verified: what is expected of that."""
        tokens = len(at_hand.decoding) + sum(at_hand.sizes) + at_hand.prefill
        return Plan(
            at_hand.sizes,
            np.maximum(survivals, 0.0).sum(axis=1).tolist(),
            float(at_hand.rounds_ms(tokens, tokens)[0]),
        )

    def _part(self, at_hand: _AtHand, survivals: FloatArray) -> Plan:
        """What pays of them."""
        decoding = at_hand.decoding
        weights, wanted = self._classes.weights(decoding), self._classes.wanted(decoding)
        reserved = None
        if wanted is not None:
            rank = np.ones(len(decoding)) if weights is None else weights
            reserved = reserve(survivals, wanted, rank, at_hand.planned.ceiling)
        return plan_lengths(
            survivals,
            at_hand.rounds_ms,
            extra_tokens=at_hand.prefill,
            ceiling=at_hand.planned.ceiling,
            search=at_hand.search,
            weights=weights,
            reserved=reserved,
        )

    def settle(self, results: Seq[VerificationResult]) -> None:
        """After the step: how many of the draft tokens that should have been accepted were."""
        judge, promised = self._judges.now, self._promised
        if judge is None or not promised:
            return
        self._promised = {}
        accepted = {result.request_id: result.accepted for result in results}
        for name, (sequence, of_request) in promised.items():
            sequence.prospect.settle(of_request, accepted[name])
        judge.gate.settle(sum(p for _, p in promised.values()), sum(accepted.values()))

    @property
    def _asynchronous(self) -> bool:
        """Whether earlier steps say how much a step verifies, where it may not search for itself.

        Algorithm 1 stops at the first dent of Θ, and padded shapes are full of them (paper §5.2).
        """
        if self._config.planner == "auto":
            return self._judges.table is not None and bool(self._judges.table.padded)
        return self._config.planner == "asynchronous"


def _see(
    gate: DraftGate,
    decoding: Seq[Sequence],
    survivals: FloatArray,
    sizes: list[int],
    asked: int,
) -> None:
    """Let gate and policy know blocks, before it is known what comes of them."""
    seen = []
    for sequence, row, size in zip(decoding, survivals, sizes, strict=True):
        if size:
            sequence.prospect.see(row[:size])
            seen.append(row[:size])
        elif sequence.prospect.left_out and asked:
            # What a round brings hangs on how many are drafted for.
            seen.append(np.zeros(asked, dtype=np.float32))
    gate.record(seen)
