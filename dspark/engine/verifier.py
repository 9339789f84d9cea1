"""The verifier's step loop (design §4): plan, one forward, accept, commit, ask for the next blocks.

Each call of `step` runs every admitted request once: decoding requests with their anchor and the
admitted part of their block, new ones with the next chunk of their prompt. Only this engine commits
tokens. While no drafter answers, blocks are looked up in the requests' own text, or every request
decodes one token a step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from dspark.config import EngineConfig
from dspark.decoding.acceptance import Verdict
from dspark.engine.draft_link import DraftLink
from dspark.engine.exchange import DraftExchange
from dspark.engine.features import FeatureStore
from dspark.engine.judge import Judged, judge
from dspark.engine.lookup import PromptLookup
from dspark.engine.roster import Roster
from dspark.engine.sequence import Sequence
from dspark.kernels.attention_plan import PAGE_SIZE, plan_attention
from dspark.kernels.cpu import operators
from dspark.models.drafter import FeatureProjection
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.outcomes import OutcomeSample
from dspark.scheduling.planner import Search, plan_lengths
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.scheduling.survival import survival
from dspark.types import (
    Request,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

_SPLIT_GAIN = 0.95  # a round is halved for no less than this


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one sequence does in one step."""

    sequence: Sequence
    rows: int  # target rows: prompt chunk, or anchor and admitted draft tokens
    verified: int  # draft tokens among them
    emits: bool  # whether the last rows decide a token

    @property
    def logit_rows(self) -> int:
        return self.verified + 1 if self.emits else 0


class VerifierEngine:
    """Generates for many requests at once. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        target: TargetModel,
        config: EngineConfig,
        *,
        projection: FeatureProjection | None = None,  # None: the drafter reads token ids
        link: DraftLink | None = None,
        lookup: PromptLookup | None = None,  # drafts while the link is down, or there is none
        block_size: int = 0,
        context_window: int = 0,
        calibration: CalibrationInUse | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        if projection is not None and link is None:
            raise ValueError("features are projected for a drafter only: give its link too")
        self.target = target
        self.config = config
        self._times: RoundTimes | None = None
        self._gate: DraftGate | None = None
        self._judges: tuple[tuple[RoundTimes, DraftGate], ...] | None = None  # see _turn_to
        self.eos_token_ids = eos_token_ids
        self._lookup = lookup
        self._looks_up = False  # the latest blocks come from there
        self._exchange: DraftExchange | None = None
        if link is not None:
            self._exchange = DraftExchange(link, target.vocab_size, context_window)
        self.block_size = config.block_size or block_size  # γ, where a plan says nothing else
        self.calibration = calibration or CalibrationInUse(block_size, "")
        self._sample = OutcomeSample(block_size)
        self._plan = StepPlan(policy=VerificationPolicy(config.policy))
        self._plan_until = float("inf")
        self.roster = Roster(
            config,
            vocab_size=target.vocab_size,
            max_positions=target.max_positions,
            free_session=self._free_session,
        )
        self._kv = PagedKVCache(self.roster.pages.total + 1, target.device)
        self._features: FeatureStore | None = None
        if projection is not None:
            self._features = FeatureStore(projection, self._kv.num_slots)
        self._steps = 0
        self._forward_ended: float | None = None
        self._asked = 0  # length of blocks asked for in the round that ends with the next step
        self._drafting = 0  # length of blocks that the gate last let through
        self._promised = 0.0  # draft tokens of this step that should be accepted
        self._rows = 1.0  # target rows of a request in the last step that decoded
        self.drafting_s = 0.0  # features projected and blocks asked for; drafted, too, if here
        self.last_report: StepReport | None = None

    @property
    def table(self) -> StepTimeTable | None:
        """The step-time table; without one, `adaptive` verifies whole blocks."""
        return None if self._times is None else self._times.table

    @table.setter
    def table(self, table: StepTimeTable) -> None:
        by_drafter, looked_up = RoundTimes(table), RoundTimes(table)
        self._judges = (by_drafter, DraftGate(by_drafter)), (looked_up, DraftGate(looked_up))
        self._turn_to(looks_up=self._exchange is None)

    @property
    def drafts(self) -> bool:
        """Whether there is anything to draft with."""
        return self._exchange is not None or self._lookup is not None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Pay for first uses, the cache's memory above all, before the first request comes."""
        row = torch.zeros(1, dtype=torch.int64)
        page = np.ones(1, dtype=np.int32)
        plan = plan_attention([page], [0], [1], self.target.device)
        out = self.target.forward(TargetBatch(row, plan, row), self._kv)
        if self._features is not None and out.taps is not None:
            self._features.keep(out.taps, plan.slots)
            self._features.rows(plan.slots)

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; InvalidRequestError if it can never run, OverloadedError if full."""
        stops = frozenset(request.sampling.stop_token_ids) | frozenset(self.eos_token_ids)
        self.roster.add(request, stops)

    def abort(self, request_id: str) -> None:
        """Drop a request and all it holds; an unknown one is nothing to do."""
        self.roster.abort(request_id)

    def check_pages(self) -> None:
        """RuntimeError if a page is lost, or held otherwise than the requests believe."""
        self.roster.check()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.roster.running or self.roster.waiting)

    @property
    def load(self) -> tuple[int, int, int, int]:
        """Requests running, requests waiting, pages free, pages in all."""
        roster = self.roster
        return len(roster.running), len(roster.waiting), roster.pages.free, roster.pages.total

    def set_plan(self, plan: StepPlan) -> None:
        """Follow `plan` until its validity ends, then the configuration again."""
        self._plan = plan
        self._plan_until = time.monotonic() + plan.valid_for_s

    # -- one step ---------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[VerificationResult]:
        """Advance every request; the tokens that each committed."""
        self.roster.admit()
        if not self.roster.running:
            return []
        operators.spread_threads()
        waited_ms = 0.0
        if self._exchange is not None:
            waited_ms = self._exchange.receive(self.roster.running, self._patience)
        self.roster.make_room()
        turns = self._plan_turns()
        if not turns:
            return []  # those who were ready gave their pages to those who are drafted for
        forward_started = time.perf_counter()
        judged = self._forward(turns)
        ended = time.perf_counter()
        step_ms = (ended - forward_started) * 1e3
        # From the end of one forward to the end of the next, unless the engine rested in between.
        round_ms = None if self._forward_ended is None else (ended - self._forward_ended) * 1e3
        self._forward_ended = ended
        results = [self._commit(turn, judged[i]) for i, turn in enumerate(turns) if turn.emits]
        for turn in turns:
            if not turn.emits:
                turn.sequence.computed += turn.rows
        self._record(turns, results, step_ms, waited_ms, round_ms)
        stepped = [turn.sequence for turn in turns]
        asked_at = time.perf_counter()
        self._ask_for_blocks(stepped)
        self.drafting_s += time.perf_counter() - asked_at
        self.roster.settle(stepped)
        if not self.has_work:
            self._forward_ended = None
        return results

    def _plan_turns(self) -> list[_Turn]:
        """Who takes part, and with how many rows: all but those whose blocks are under way."""
        ready = [s for s in self.roster.running.values() if s.wanted_block is None]
        decoding = [s for s in ready if s.decoding and s.computed]
        turns: list[_Turn] = []
        prompts = [s for s in ready if not (s.decoding and s.computed)]
        budget = self._prefill_budget(len(decoding)) if prompts else 0
        for sequence in prompts:
            rows = min(len(sequence.tokens) - sequence.computed, budget)
            if rows:
                budget -= rows
                end = sequence.computed + rows
                turns.append(_Turn(sequence, rows, 0, end == len(sequence.tokens)))
        prefill = sum(turn.rows for turn in turns)
        if len(decoding) == len(self.roster.running) and self._halves_pay():
            # The others keep their blocks, and are stepped while these are drafted for.
            decoding = decoding[: (len(decoding) + 1) // 2]
        lengths = self._plan_verification(decoding, prefill)
        turns += [_Turn(s, n + 1, n, True) for s, n in zip(decoding, lengths, strict=True)]
        return turns

    def _patience(self, under_way: list[Sequence]) -> float:
        """Seconds to wait for blocks before stepping without those who wait for them.

        One step for all takes less time than two. While the wait is shorter than that, it pays;
        those who are late are waited for as long, and no longer.
        """
        others = [s for s in self.roster.running.values() if s.wanted_block is None]
        times, exchange = self._times, self._exchange
        if not others or times is None or exchange is None:
            return math.inf  # until the deadline
        prefill = sum(len(s.tokens) - s.computed for s in others if not s.decoding)
        decoding = sum(s.decoding for s in others)
        tokens = round(decoding * self._rows) + min(prefill, self._prefill_budget(decoding))
        saving_ms = times.merging_saves_ms(
            (len(others), max(tokens, len(others))),
            (len(under_way), round(len(under_way) * self._rows)),
        )
        passed_ms = (time.monotonic() - max(s.asked_at for s in under_way)) * 1e3
        if exchange.latency_ms - passed_ms > saving_ms:
            return 0.0
        return (max(exchange.latency_ms, saving_ms) - passed_ms) / 1e3

    def _halves_pay(self) -> bool:
        """Whether to let drafting and verification overlap."""
        times, exchange, count = self._times, self._exchange, len(self.roster.running)
        if times is None or exchange is None or not exchange.latency_ms or not self._drafting:
            return False
        tokens, size = round(count * self._rows), self._drafting
        halved = times.overlapped_ms(count, tokens, size, exchange.latency_ms)
        whole = times.step_ms(count, tokens) + times.draft_ms(count, size)
        return halved < _SPLIT_GAIN * whole

    def _prefill_budget(self, decoding: int) -> int:
        """Prompt tokens that this step may hold: those who decode are not to stall behind them."""
        most = self.config.prefill_chunk_tokens
        times = self._times
        if times is None or not decoding:
            return most
        limit = self.config.prefill_stretch * times.step_ms(decoding, decoding)
        while most > PAGE_SIZE and times.step_ms(decoding, decoding + most) > limit:
            most //= 2
        return most

    def _plan_verification(self, decoding: list[Sequence], prefill: int) -> list[int]:
        plan = self._current_plan()
        blocks = [s.proposal for s in decoding]
        sizes = [0 if block is None else len(block.token_ids) for block in blocks]
        if plan.policy is VerificationPolicy.OFF or not any(sizes):
            return [0] * len(decoding)
        times, gate = self._times, self._gate
        if plan.policy is VerificationPolicy.FIXED or times is None or gate is None:
            return sizes
        # Looked up blocks come with measured chances, and the gate has seen them already.
        temperatures = () if self._looks_up else self.calibration.temperatures
        survivals = [
            np.zeros(0, dtype=np.float32)
            if block is None
            else survival(block.confidences, temperatures)
            for block in blocks
        ]
        if not self._looks_up:
            gate.record([block for block in survivals if len(block)])
        # Waiting is over when a step is planned; but a round that waited is worth more tokens.
        alone = len(decoding) == len(self.roster.running)
        size = self._asked or self.block_size
        lengths = plan_lengths(
            survivals,
            lambda tokens: times.round_ms(len(decoding), tokens, size, waits=alone),
            extra_tokens=prefill,
            max_draft_tokens=plan.max_draft_tokens,
            search=_search(decoding),
        )
        self._promised = sum(
            float(block[:n].sum()) for block, n in zip(survivals, lengths, strict=True)
        )
        return lengths

    def _current_plan(self) -> StepPlan:
        if time.monotonic() > self._plan_until:
            self._plan = StepPlan(policy=VerificationPolicy(self.config.policy))
            self._plan_until = float("inf")
        return self._plan

    def _forward(self, turns: list[_Turn]) -> dict[int, Verdict]:
        """One flattened forward; the verdict of each turn that emits, by its index."""
        tokens: list[int] = []
        logit_rows: list[int] = []
        for turn in turns:
            sequence, start = turn.sequence, turn.sequence.computed
            tokens += sequence.tokens[start : start + turn.rows - turn.verified]
            if turn.verified:
                assert sequence.proposal is not None
                tokens += sequence.proposal.token_ids[: turn.verified].tolist()
            logit_rows += range(len(tokens) - turn.logit_rows, len(tokens))
        plan = plan_attention(
            [turn.sequence.pages for turn in turns],
            [turn.sequence.computed for turn in turns],
            [turn.rows for turn in turns],
            self.target.device,
        )
        batch = TargetBatch(
            token_ids=torch.tensor(tokens),
            attention=plan,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
        out = self.target.forward(batch, self._kv)
        if self._features is not None and out.taps is not None:
            self._features.keep(out.taps, plan.slots)
        emitting = [i for i, turn in enumerate(turns) if turn.emits]
        judged = [
            Judged(turns[i].sequence.request, turns[i].sequence.fence(),
                   turns[i].sequence.proposal, turns[i].verified)
            for i in emitting
        ]  # fmt: skip
        return dict(zip(emitting, judge(out.logits, judged), strict=True))

    def _commit(self, turn: _Turn, verdict: Verdict) -> VerificationResult:
        sequence, proposal = turn.sequence, turn.sequence.proposal
        drafted = 0 if proposal is None else len(proposal.token_ids)
        emitted = [] if proposal is None else proposal.token_ids[: verdict.accepted].tolist()
        kept = sequence.commit([*emitted, verdict.next_token_id])
        sequence.computed = len(sequence.tokens) - 1
        sequence.round += 1
        sequence.proposal = None
        accepted = min(verdict.accepted, len(kept))
        # what was drafted behind a token that ends the text was never put to the test
        told = turn.verified if len(kept) > accepted else accepted
        return VerificationResult(
            request_id=sequence.request.id,
            token_ids=kept,
            drafted=drafted,
            verified=turn.verified,
            accepted=accepted,
            finish_reason=sequence.finish_reason,
            confidences=tuple(proposal.confidences[:told].tolist()) if proposal and told else (),
        )

    def _free_session(self, session: str) -> None:
        if self._exchange is not None:
            self._exchange.free(session)

    # -- drafting -----------------------------------------------------------------------------

    def _ask_for_blocks(self, sequences: list[Sequence]) -> None:
        """Ask the drafter, or look up while there is none, where a block can still be of use.

        What the drafter is not sent now is sent when it is there again.
        """
        plan, lookup = self._current_plan(), self._lookup
        self._drafting = 0
        sequences = [s for s in sequences if s.request.sampling.speculate]
        if plan.policy is VerificationPolicy.OFF or not sequences:
            return
        exchange = self._exchange
        if exchange is not None and not exchange.available:
            exchange = None
        if exchange is None and lookup is None:
            return
        self._turn_to(looks_up=exchange is None)
        size, rest = plan.block_size or self.block_size, 0
        if plan.policy is VerificationPolicy.ADAPTIVE and self._gate is not None:
            latency_ms = 0.0 if exchange is None else exchange.latency_ms
            size = self._gate.block_size(
                len(self.roster.running), size, latency_ms, _search(sequences)
            )
            rest = self._gate.rest
            self._drafting = 0 if exchange is None else size
        if exchange is not None:
            if exchange.ask(sequences, self._features, size, rest=rest):
                self._asked = size
        elif lookup is not None and size:
            self._look_up(lookup, sequences, size)

    def _turn_to(self, *, looks_up: bool) -> None:
        """Go by the times and the gate of where blocks come from: they cost and bring unlike."""
        self._looks_up = looks_up
        if self._judges is not None:
            self._times, self._gate = self._judges[looks_up]

    def _look_up(self, lookup: PromptLookup, sequences: list[Sequence], size: int) -> None:
        survivals = []
        for sequence in sequences:
            useful = min(size, sequence.remaining - 1)
            if sequence.finish_reason or not sequence.decoding or useful <= 0:
                continue
            block = sequence.proposal = lookup.propose(sequence, useful)
            # Nothing found counts: what a round brings hangs on how many find something.
            survivals.append(
                np.zeros(size, dtype=np.float32) if block is None else survival(block.confidences)
            )
        if survivals:
            self._asked = size
            if self._gate is not None:
                self._gate.record(survivals)

    # -- accounts -----------------------------------------------------------------------------

    def _record(
        self,
        turns: list[_Turn],
        results: list[VerificationResult],
        step_ms: float,
        waited_ms: float,
        round_ms: float | None,
    ) -> None:
        self._steps += 1
        asked, self._asked = self._asked, 0
        under_way = any(s.wanted_block is not None for s in self.roster.running.values())
        decode = [turn for turn in turns if turn.emits]
        drafted = sum(result.drafted for result in results)
        prefill = sum(turn.rows for turn in turns) - sum(turn.logit_rows for turn in turns)
        learns = self._current_plan().policy is VerificationPolicy.ADAPTIVE
        if learns and self._times is not None and decode and not prefill and round_ms is not None:
            self._times.record(
                requests=len(decode),
                tokens=sum(turn.rows for turn in turns),
                drafted=asked,
                step_ms=step_ms,
                round_ms=round_ms,
                waited_ms=waited_ms,
                overlapped=under_way,
            )
            self._rows = sum(turn.rows for turn in turns) / len(decode)
        if self._gate is not None and self._promised:
            self._gate.settle(self._promised, sum(result.accepted for result in results))
            self._promised = 0.0
        if not self._looks_up:
            self._sample.add(results)
        width = self.block_size
        _, waiting, free, total = self.load
        self.last_report = StepReport(
            step=self._steps,
            step_ms=step_ms,
            draft_wait_ms=waited_ms,
            decode_requests=len(decode),
            waiting_requests=waiting,
            tokens=sum(turn.rows for turn in turns),
            prefill_tokens=prefill,
            drafted=drafted,
            verified_by_position=_by_position([r.verified for r in results], width),
            accepted_by_position=_by_position([r.accepted for r in results], width),
            committed=sum(len(result.token_ids) for result in results),
            free_pages=free,
            total_pages=total,
            calibration_epoch=self.calibration.epoch,
            calibrations_refused=self.calibration.refused,
            outcomes=self._sample.take(self.calibration.temperatures),
        )


def _search(sequences: list[Sequence]) -> Search:
    """The freest that biases nothing: a sampled token may depend on what is verified, or not."""
    samplings = (s.request.sampling for s in sequences)
    unbiased = all(s.greedy or s.mode is VerifyMode.COUPLED for s in samplings)
    return "global" if unbiased else "causal"


def _by_position(lengths: list[int], width: int) -> tuple[int, ...]:
    """How many requests reached each block position."""
    return tuple(sum(length > k for length in lengths) for k in range(width))
