"""How much of what was drafted a step verifies, and what was promised of it (design §4).

It sees confidences and never tokens; dspark.scheduling.planner says which searches bias nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from dspark.config import EngineConfig
from dspark.engine.classes import ServiceClasses
from dspark.engine.judges import Judges
from dspark.engine.sequence import Sequence
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.explanation import Basis, Planned
from dspark.scheduling.planner import Search, plan_lengths, reserve
from dspark.scheduling.survival import survival_table
from dspark.types import (
    RAW_SCALES,
    FloatArray,
    StepPlan,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

_NO_BLOCK = np.zeros(0, dtype=np.float32)


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
        survivals = survival_table(confidences, greedy, scales)
        if not looks_up:
            _see(judge.gate, decoding, survivals, sizes, asked)
        weights, wanted = self._classes.weights(decoding), self._classes.wanted(decoding)
        reserved = None
        if wanted is not None:
            rank = np.ones(len(decoding)) if weights is None else weights
            reserved = reserve(survivals, wanted, rank, ceiling)
        # Waiting is over when a step is planned; but a round that waited is worth more tokens.
        found = plan_lengths(
            survivals,
            lambda least, most: judge.times.rounds_ms(
                len(decoding), least, most, size, waits=alone
            ),
            extra_tokens=prefill,
            ceiling=ceiling,
            search=search,
            weights=weights,
            reserved=reserved,
        )
        self._promised = {
            sequence.request.id: (sequence, promised)
            for sequence, promised in zip(decoding, found.promised, strict=True)
            if promised
        }
        self.planned = Planned(plan, Basis(search), *of, ceiling, found)
        return found.lengths

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
