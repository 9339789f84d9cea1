"""What is drafted and how much of it is verified: by whom, for whom, how long (design §4).

Nothing here sees logits or commits tokens: whatever it decides, the target's law comes out. Blocks
come from the drafter at the end of the link. While there is none, or it does not answer, they are
looked up in the requests' own text, or every request decodes one token a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from dspark.config import EngineConfig
from dspark.engine.classes import ServiceClasses
from dspark.engine.demand import DraftDemand
from dspark.engine.exchange import DraftExchange
from dspark.engine.features import FeatureStore
from dspark.engine.judges import Judge, Judges
from dspark.engine.lookup import PromptLookup
from dspark.engine.plan_in_force import PlanInForce
from dspark.engine.rounds import Round
from dspark.engine.sequence import Sequence
from dspark.engine.verification import Verification, freest_search
from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.scheduling.autoscaling.signals import DraftCounts
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.explanation import Basis, Planned
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.scheduling.survival import survival
from dspark.types import StepPlan, VerificationPolicy, VerificationResult

_SPLIT_GAIN = 0.95  # a round is halved for no less than this


class Speculation:
    """One verifier's; it owns what the verifier knows of drafting and of the time that things take.

    `running` is all requests that are admitted, here and below.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        exchange: DraftExchange | None,
        features: FeatureStore | None,  # None: the drafter reads token ids
        lookup: PromptLookup | None,
        block_size: int,  # the drafter's own
        calibration: CalibrationInUse,
    ) -> None:
        self._own_block_size = block_size
        self.classes = ServiceClasses(config.classes)
        self._config = config
        self._exchange, self._features, self._lookup = exchange, features, lookup
        self._judges = Judges(has_drafter=exchange is not None)
        self._plan = PlanInForce(config)
        self._verification = Verification(config, self._judges, self.classes, calibration)
        self._asked = 0  # length of blocks asked for in the round that ends with the next step
        self._narrow = False  # and that they are for a few of the requests
        self._few_asked = False  # because the gate wants to see what texts are like
        self._ended = 0, False, False  # the same of the round before
        self._drafting = 0  # length of blocks that the gate last let through
        self._rows = 1.0  # target rows of a request in the last step that decoded
        self._held = 0  # rows of all requests in the target's cache
        self._demand = DraftDemand()

    @property
    def drafts(self) -> bool:
        """Whether there is anything to draft with."""
        return self._exchange is not None or self._lookup is not None

    @property
    def counts(self) -> DraftCounts:
        """What was done about a drafter, since the start; one in this process counts, too."""
        demand, exchange = self._demand, self._exchange
        if exchange is None:
            return DraftCounts(demand.rounds)
        return DraftCounts(demand.rounds, demand.wanting, exchange.asked, exchange.missed)

    @property
    def looks_up(self) -> bool:
        """Whether the latest blocks were looked up, not drafted."""
        return self._judges.looks_up

    @property
    def table(self) -> StepTimeTable | None:
        """The step-time table; without one, `adaptive` verifies whole blocks."""
        return self._judges.table

    @table.setter
    def table(self, table: StepTimeTable) -> None:
        self._judges.table = table

    @property
    def calibration(self) -> CalibrationInUse:
        """What confidences are read by."""
        return self._verification.calibration

    @calibration.setter
    def calibration(self, calibration: CalibrationInUse) -> None:
        self._verification.calibration = calibration

    @property
    def planned(self) -> Planned:
        """How the last step was planned, for those who ask why."""
        return self._verification.planned or Planned(self._plan.now, Basis.PROMPTS, 0)

    @property
    def block_size(self) -> int:
        """γ, where a plan says nothing else."""
        return self._config.block_size or self._own_block_size

    def reconfigure(self, config: EngineConfig) -> None:
        """Go on by `config` from the next step on."""
        self._config = config
        self.classes.change(config.classes)
        self._plan.reconfigure(config)

    def follow(self, plan: StepPlan) -> None:
        """Follow `plan` until its validity ends, then the configuration again."""
        self._plan.follow(plan)

    @property
    def _times(self) -> RoundTimes | None:
        return None if self._judges.now is None else self._judges.now.times

    # -- before a step ------------------------------------------------------------------------

    def receive(self, running: dict[str, Sequence]) -> float:
        """Give blocks that came to their requests; waits while that pays. Milliseconds waited."""
        contexts = [s.computed for s in running.values() if s.computed]
        self._held = sum(contexts)
        if contexts:
            self._judges.set_context(self._held / len(contexts))
        if self._exchange is None:
            return 0.0
        return self._exchange.receive(running, lambda under_way: self._patience(running, under_way))

    def prefill_budget(self, decoding: int, prompts: Iterable[Sequence] = ()) -> int:
        """Prompt tokens that a step may hold: those who decode are not to stall behind them.

        Unless a first token is soon too late.
        """
        most = self._config.prefill_chunk_tokens
        times = self._times
        if times is None or not decoding or self.classes.urgent(prompts):
            return most
        limit = self._config.prefill_stretch * times.step_ms(decoding, decoding)
        while most > PAGE_SIZE and times.step_ms(decoding, decoding + most) > limit:
            most //= 2
        return most

    def halves_pay(self, running: int) -> bool:
        """Whether to let drafting and verification overlap."""
        times, exchange = self._times, self._exchange
        if times is None or exchange is None or not exchange.latency_ms or not self._drafting:
            return False
        tokens, size = round(running * self._rows), self._drafting
        halved = times.overlapped_ms(running, tokens, size, exchange.latency_ms)
        whole = times.step_ms(running, tokens) + times.draft_ms(running, size)
        return halved < _SPLIT_GAIN * whole

    def verification(self, decoding: Seq[Sequence], prefill: int, running: int) -> list[int]:
        """How many draft tokens of each to verify beside `prefill` prompt tokens."""
        plan = self._plan.now
        return self._verification.lengths(
            decoding,
            plan,
            prefill=prefill,
            asked=self._asked,
            alone=len(decoding) == running,
            block_size=self.block_size,
            why_none=lambda: self._why_none(plan.policy, decoding),
        )

    def _why_none(self, policy: VerificationPolicy, decoding: Seq[Sequence]) -> Basis:
        """What is the reason that there is nothing to verify."""
        if not decoding:
            return Basis.PROMPTS
        if policy is VerificationPolicy.OFF:
            return Basis.OFF
        if not any(s.request.sampling.speculate for s in decoding):
            return Basis.UNWANTED
        if self._asked:
            return Basis.NO_BLOCKS
        asks = self._exchange is not None and self._exchange.available
        return Basis.NOT_ASKED if asks or self._lookup is not None else Basis.NO_DRAFTER

    def _patience(self, running: dict[str, Sequence], under_way: list[Sequence]) -> float:
        """Seconds to wait for blocks before stepping without those who wait for them.

        One step for all takes less time than two. While the wait is shorter than that, it pays;
        those who are late are waited for as long, and no longer.
        """
        others = [s for s in running.values() if s.wanted_block is None]
        times, exchange = self._times, self._exchange
        if not others or times is None or exchange is None:
            return math.inf  # until the deadline
        prefill = sum(len(s.tokens) - s.computed for s in others if not s.decoding)
        decoding = sum(s.decoding for s in others)
        tokens = round(decoding * self._rows) + min(prefill, self.prefill_budget(decoding))
        saving_ms = times.merging_saves_ms(
            (len(others), max(tokens, len(others))),
            (len(under_way), round(len(under_way) * self._rows)),
        )
        passed_ms = (time.monotonic() - max(s.asked_at for s in under_way)) * 1e3
        if exchange.latency_ms - passed_ms > saving_ms:
            return 0.0
        return (max(exchange.latency_ms, saving_ms) - passed_ms) / 1e3

    # -- during it ----------------------------------------------------------------------------

    def study(self) -> None:
        """Look at what is verified, as far as its amount did not depend on that."""
        self._verification.study()

    def foresee(self, running: dict[str, Sequence]) -> None:
        """Judge anew which blocks pay, if that would be due when the next are asked for."""
        judge, plan = self._judges.now, self._plan.now
        if judge is None or plan.policy is not VerificationPolicy.ADAPTIVE:
            return
        if judge.gate.due(len(running)):
            self._estimate(judge.gate, list(running.values()), len(running), plan)

    # -- after it -----------------------------------------------------------------------------

    def settle(self, results: Seq[VerificationResult]) -> None:
        """Take in what came of a step's drafts, before the next step is planned."""
        self._verification.settle(results)

    def learn(self, of: Round) -> None:
        """Take in what a round took, before the blocks after the next are asked for."""
        asked, narrow, few = self._ended
        times, round_ms = self._times, of.round_ms
        adaptive = self._plan.now.policy is VerificationPolicy.ADAPTIVE
        learns = adaptive and of.requests and not of.first_use
        if times is not None and round_ms is not None and learns:
            if few:
                times.record_few(of.requests, round_ms - of.step_ms)
            elif not narrow:
                times.record(
                    requests=of.requests,
                    tokens=of.tokens,
                    drafted=asked,
                    step_ms=of.step_ms,
                    round_ms=round_ms,
                    waited_ms=of.waited_ms,
                    overlapped=of.overlapped,
                    prefill=of.prefill,
                )
        if of.requests and not of.prefill:
            self._rows = of.tokens / of.requests
        if of.requests and of.round_ms is not None:
            self.classes.learn(of.round_ms)

    def ask(self, stepped: Seq[Sequence], running: int) -> None:
        """Ask the drafter, or look up while there is none, where a block can still be of use.

        What the drafter is not sent now is sent when it is there again.
        """
        plan, lookup = self._plan.now, self._lookup
        self._ended = self._asked, self._narrow, self._few_asked
        self._asked, self._narrow, self._few_asked = 0, False, False
        self._drafting = 0
        self._demand.rounds += 1
        sequences = [s for s in stepped if s.request.sampling.speculate]
        if plan.policy is VerificationPolicy.OFF or not sequences:
            return
        exchange = self._exchange
        adaptive = plan.policy is VerificationPolicy.ADAPTIVE
        size, rest = plan.block_size or self.block_size, 0
        if exchange is not None and not exchange.available:
            judge = self._judges.of_drafter if adaptive else None
            gate = None if judge is None else judge.gate
            search = freest_search(sequences)
            self._demand.count_without(gate, running, size, exchange.latency_ms, search)
            exchange = None
        if exchange is None and lookup is None:
            return
        self._judges.looks_up = exchange is None
        judge = self._judges.now if adaptive else None
        if judge is not None:
            gate = judge.gate
            if gate.due(running):
                self._estimate(gate, sequences, running, plan)
            size = gate.block_size(running, size)
            rest = gate.rest
            if not size and self._rests(exchange, rest):
                self._demand.count(gate)
                return
            if gate.width is None:
                self._drafting = 0 if exchange is None else size
            else:
                sequences = self._few(sequences, gate.width)
                self._narrow = self._few_asked = size > 0
        if exchange is not None:
            self._demand.count(None if judge is None else judge.gate)
            sizes = self._sizes(sequences, size, plan, judge)
            if exchange.ask(sequences, self._features, sizes, rest=rest):
                self._asked = max(sizes)
        elif lookup is not None and size:
            self._look_up(lookup, sequences, size)

    def _rests(self, exchange: DraftExchange | None, rounds: int) -> bool:
        """Whether there is nothing to send either, if no blocks are wanted for so many rounds."""
        if exchange is None or self.classes.has_floors:
            return False
        return rounds > exchange.lead(self._held)

    def _estimate(
        self, gate: DraftGate, sequences: Seq[Sequence], running: int, plan: StepPlan
    ) -> None:
        exchange, most = self._exchange, plan.block_size or self.block_size
        drafted = exchange is not None and not self._judges.looks_up
        latency_ms = exchange.latency_ms if exchange is not None and drafted else 0.0
        gate.estimate(running, most, latency_ms, freest_search(sequences))

    def _few(self, sequences: Seq[Sequence], count: int) -> list[Sequence]:
        """So many that a block can be of use to, those with a floor that wants one first."""
        useful = [s for s in sequences if s.useful]
        wanted = self.classes.wanted(useful)
        if wanted is None:
            return useful[:count]
        floors = int(np.count_nonzero(wanted))
        order = np.argsort(wanted == 0.0, kind="stable")
        return [useful[i] for i in order[: max(count, floors)]]

    def _sizes(
        self, sequences: Seq[Sequence], size: int, plan: StepPlan, judge: Judge | None
    ) -> list[int]:
        """Draft tokens to ask for, for each of `sequences`; features of all flow."""
        sizes = [size] * len(sequences)
        at = [i for i, s in enumerate(sequences) if s.useful]
        drafted = [sequences[i] for i in at]
        for sequence in drafted:
            sequence.prospect.left_out = False
        # Rounds with blocks of another length than the usual one are run to learn, with all.
        usual = judge is not None and 0 < size == judge.gate.usual_size
        if judge is not None and usual and drafted and plan.draft_by_request:
            weights = self.classes.weights(drafted)
            chosen = judge.policy.sizes(
                [s.prospect for s in drafted], size, weights=weights, most_blocks=plan.max_blocks
            )
            if self._features is not None:
                # Blocks of one length are one pass of such a drafter, and each other length is one
                # more. What is too long for one of them is cut when it is verified.
                longest = max(chosen)
                chosen = [longest if wanted else 0 for wanted in chosen]
            for i, wanted in zip(at, chosen, strict=True):
                sizes[i] = wanted
        floors = self.classes.wanted(drafted)
        if floors is not None:
            # Plain decoding falls short of them: whatever all together gain, these need blocks.
            whole = plan.block_size or self.block_size
            for i, wanted in zip(at, floors.tolist(), strict=True):
                if wanted > 0.0 and not sizes[i]:
                    sizes[i], self._narrow = whole, self._narrow or not size
                    sequences[i].prospect.left_out = False
        if 0 < plan.max_blocks < len(at):
            # What such a round takes says nothing of one with blocks for all who would have one.
            self._narrow = any(sizes)
            for i in [i for i in at if sizes[i]][plan.max_blocks :]:
                sizes[i] = 0
        return sizes

    def free(self, session: str) -> None:
        """Tell the drafter that a request is over, or must be drafted for anew."""
        if self._exchange is not None:
            self._exchange.free(session)

    def _look_up(self, lookup: PromptLookup, sequences: Seq[Sequence], size: int) -> None:
        survivals = []
        for sequence in sequences:
            if not sequence.useful:
                continue
            block = sequence.proposal = lookup.propose(sequence, min(size, sequence.useful))
            # Nothing found counts: what a round brings hangs on how many find something.
            survivals.append(
                np.zeros(size, dtype=np.float32) if block is None else survival(block.confidences)
            )
        if survivals:
            self._asked = size
            if self._judges.now is not None:
                self._judges.now.gate.record(survivals)
