"""The verifier's step loop (design §4): plan, one forward, accept, commit, ask for the next blocks.

Each call of `step` runs every admitted request once: decoding requests with their anchor and the
admitted part of their block, new ones with the next chunk of their prompt. Only this engine commits
tokens; dspark.engine.speculation decides what is drafted and verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dspark.config import EngineConfig
from dspark.decoding.acceptance import Verdict
from dspark.engine.accounts import StepAccounts
from dspark.engine.draft_link import DraftLink
from dspark.engine.exchange import DraftExchange
from dspark.engine.features import FeatureStore
from dspark.engine.judge import Judged, judge
from dspark.engine.lookup import PromptLookup
from dspark.engine.roster import Roster
from dspark.engine.rounds import Round
from dspark.engine.sequence import Sequence
from dspark.engine.speculation import Speculation
from dspark.errors import ConfigError, DSparkError, QueueTimeoutError
from dspark.kernels.attention_plan import plan_attention
from dspark.kernels.cpu import operators
from dspark.models.capture import Capture
from dspark.models.drafter import FeatureProjection
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.autoscaling.signals import DraftCounts
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.explanation import StepExplanation
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import (
    Request,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerificationResult,
)


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
        self.eos_token_ids = eos_token_ids
        self.roster = Roster(
            config,
            vocab_size=target.vocab_size,
            max_positions=target.max_positions,
            free_session=self._free_session,
        )
        # Nobody else may write to it while requests run.
        self.kv = PagedKVCache(self.roster.pages.total + 1, target.device)
        self._features: FeatureStore | None = None
        if projection is not None:
            self._features = FeatureStore(projection, self.kv.num_slots)
        exchange = None
        if link is not None:
            exchange = DraftExchange(link, target.vocab_size, context_window)
        self._speculation = Speculation(
            config,
            exchange=exchange,
            features=self._features,
            lookup=lookup,
            block_size=block_size,
            calibration=calibration or CalibrationInUse(block_size, ""),
        )
        self._accounts = StepAccounts(block_size)
        self._forward_ended: float | None = None
        self._captured = Capture.made  # until then
        self._overlaps = target.device.type == "cuda"  # the host may go on beside a forward
        self._unlearnt: Round | None = None  # the last round, until it has been learnt from
        self.drafting_s = 0.0  # features projected, blocks asked for and waited for

    @property
    def table(self) -> StepTimeTable | None:
        """The step-time table; without one, `adaptive` verifies whole blocks."""
        return self._speculation.table

    @table.setter
    def table(self, table: StepTimeTable) -> None:
        self._speculation.table = table

    @property
    def calibration(self) -> CalibrationInUse:
        """What confidences are read by."""
        return self._speculation.calibration

    @calibration.setter
    def calibration(self, calibration: CalibrationInUse) -> None:
        self._speculation.calibration = calibration

    @property
    def block_size(self) -> int:
        """γ, where a plan says nothing else."""
        return self._speculation.block_size

    @property
    def drafts(self) -> bool:
        """Whether there is anything to draft with."""
        return self._speculation.drafts

    def on_lost(self, tell: Callable[[DSparkError], None]) -> None:
        """Call `tell`, from any thread, should a process be lost that has a part of the target."""
        self.target.on_lost(tell)

    def reconfigure(self, config: EngineConfig) -> None:
        """Go on by `config`, between two steps; what is under way keeps its place and its pages.

        It may differ in policy, block size, drafting by request, service classes, and bounds of
        the queue and of prompts; the rest is what this engine was made of. ConfigError if it
        becomes adaptive without step times, which are measured when an engine is made.
        """
        adaptive = config.policy == VerificationPolicy.ADAPTIVE
        if adaptive and self.config.policy != config.policy and self.drafts and self.table is None:
            raise ConfigError(
                f"the policy cannot become adaptive: this verifier began as {self.config.policy} "
                "and has no step times. Set engine.policy in the application's args, which starts "
                "verifiers anew"
            )
        self.config = config
        self.roster.reconfigure(config)
        self._speculation.reconfigure(config)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Pay for first uses, the cache's memory above all, before the first request comes."""
        row = torch.zeros(1, dtype=torch.int64)
        page = np.ones(1, dtype=np.int32)
        plan = plan_attention([page], [0], [1], self.target.device)
        out = self.target.forward(TargetBatch(row, plan, row), self.kv)
        if self._features is not None and out.taps is not None:
            self._features.keep(out.taps, plan.slots)
            self._features.rows(plan.slots)
        if self.target.device.type == "cuda" and self.target.padded is not None:
            rows = self.config.max_requests * (1 + self.block_size)
            self.target.padded.warm_up(self.kv, rows + self.config.prefill_chunk_tokens)

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; InvalidRequestError if it can never run, OverloadedError if full."""
        stops = frozenset(request.sampling.stop_token_ids) | frozenset(self.eos_token_ids)
        self.roster.add(request, stops)

    def abort(self, request_id: str) -> None:
        """Drop a request and all it holds; an unknown one is nothing to do."""
        self.roster.abort(request_id)

    def expire(self) -> dict[str, QueueTimeoutError]:
        """Drop requests that have waited for too long without having begun; why, by their ids."""
        late = self.roster.expire()
        if not late:
            return {}
        error = QueueTimeoutError(
            f"the request waited for {self.config.max_queue_s:g} s and could not be begun; retry "
            "later",
            retry_after_s=self.retry_after_s,
        )
        return dict.fromkeys(late, error)

    def dismiss(self) -> list[str]:
        """Drop all requests that wait and have not begun; their ids."""
        return self.roster.dismiss()

    @property
    def retry_after_s(self) -> float:
        """When somebody who was turned away had better come back. For any thread."""
        return self.roster.retry_after_s

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

    @property
    def queue_age_s(self) -> float:
        """How long the oldest waiting request has waited; 0 if none waits. For any thread."""
        return self.roster.queue_age_s

    @property
    def floor_attainment(self) -> float:
        """Share of requests with a tokens/s floor that are above it; 1 if none has one."""
        loads = () if self.last_report is None else self.last_report.classes
        floors = sum(load.floors for load in loads)
        return 1.0 - sum(load.floors_missed for load in loads) / floors if floors else 1.0

    @property
    def draft_counts(self) -> DraftCounts:
        """What was done about a drafter, since the start. For any thread."""
        return self._speculation.counts

    @property
    def last_report(self) -> StepReport | None:
        """Of the last step; None before the first."""
        return self._accounts.last_report

    def explain(self, count: int) -> list[StepExplanation]:
        """The last steps, up to `count` of KEPT_STEPS, the latest last. For any thread."""
        return self._accounts.explain(count)

    def set_plan(self, plan: StepPlan) -> None:
        """Follow `plan` until its validity ends, then the configuration again."""
        self._speculation.follow(plan)

    # -- one step ---------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[VerificationResult]:
        """Advance every request; the tokens that each committed."""
        self.roster.admit()
        if not self.roster.running:
            return []
        operators.spread_threads()
        received_at = time.perf_counter()
        waited_ms = self._speculation.receive(self.roster.running)
        self.drafting_s += time.perf_counter() - received_at
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
        captured, self._captured = self._captured != Capture.made, Capture.made
        results = [self._commit(turn, judged[i]) for i, turn in enumerate(turns) if turn.emits]
        for turn in turns:
            if not turn.emits:
                turn.sequence.computed += turn.rows
        emitting = sum(turn.emits for turn in turns)
        tokens = sum(turn.rows for turn in turns)
        prefill = tokens - sum(turn.logit_rows for turn in turns)
        under_way = any(s.wanted_block is not None for s in self.roster.running.values())
        this = Round(emitting, tokens, prefill, step_ms, round_ms, waited_ms, under_way, captured)
        looked_up = self._speculation.looks_up
        stepped = [turn.sequence for turn in turns]
        asked_at = time.perf_counter()
        self._speculation.ask(stepped, len(self.roster.running))
        self.drafting_s += time.perf_counter() - asked_at
        # From here on a GPU drafts, until blocks are received: what can wait is done meanwhile.
        self._speculation.settle(results)
        self._unlearnt = this
        if not self._overlaps:
            self._learn()
        self._accounts.add(
            this, results, ended, self._speculation, self.roster, drafted=not looked_up
        )
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
        if self.config.classes:
            prompts.sort(key=lambda s: s.due_at)
        budget = self._speculation.prefill_budget(len(decoding), prompts) if prompts else 0
        for sequence in prompts:
            rows = min(len(sequence.tokens) - sequence.computed, budget)
            if rows:
                budget -= rows
                end = sequence.computed + rows
                turns.append(_Turn(sequence, rows, 0, end == len(sequence.tokens)))
        prefill, running = sum(turn.rows for turn in turns), len(self.roster.running)
        if len(decoding) == running and self._speculation.halves_pay(running):
            # The others keep their blocks, and are stepped while these are drafted for.
            decoding = decoding[: (len(decoding) + 1) // 2]
        lengths = self._speculation.verification(decoding, prefill, running)
        turns += [_Turn(s, n + 1, n, True) for s, n in zip(decoding, lengths, strict=True)]
        return turns

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
        out = self.target.forward(batch, self.kv)
        if self._features is not None and out.taps is not None:
            drafts = any(turn.verified for turn in turns)
            self._features.keep(out.taps, plan.slots, soon=drafts)
        emitting = [i for i, turn in enumerate(turns) if turn.emits]
        if self._overlaps:  # what is thought about now costs nothing
            self._learn()
            self._speculation.foresee(self.roster.running)
        self._speculation.study()
        judged = [
            Judged(turns[i].sequence.request, turns[i].sequence.fence(),
                   turns[i].sequence.proposal, turns[i].verified)
            for i in emitting
        ]  # fmt: skip
        verdicts = judge(out.logits, judged)
        self.target.check()
        return dict(zip(emitting, verdicts, strict=True))

    def _learn(self) -> None:
        """From the last round."""
        if self._unlearnt is not None:
            self._speculation.learn(self._unlearnt)
            self._unlearnt = None

    def _commit(self, turn: _Turn, verdict: Verdict) -> VerificationResult:
        sequence, proposal = turn.sequence, turn.sequence.proposal
        drafted = 0 if proposal is None else len(proposal.token_ids)
        emitted = [] if proposal is None else proposal.token_ids[: verdict.accepted].tolist()
        kept = sequence.commit([*emitted, verdict.next_token_id])
        sequence.computed = len(sequence.tokens) - 1
        sequence.round += 1
        if not sequence.first_token_at:
            self._speculation.classes.first_token(sequence)
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
            greedy=sequence.request.sampling.greedy,
        )

    def _free_session(self, session: str) -> None:
        self._speculation.free(session)
