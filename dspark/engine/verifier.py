"""The verifier's step loop (design §4): plan, one forward, accept, commit, ask for the next blocks.

Each call of `step` runs every admitted request once: decoding requests with their anchor and the
admitted part of their block, new ones with the next chunk of their prompt. Only this engine commits
tokens. Without a drafter, or while none answers, every request decodes one token a step.

Pages are taken as a request grows. When they run out, the request that was admitted last gives its
pages up and waits at the head of the queue; what it had said stays said, and it goes on from there
when there is room, its draws being named by position and round and not by time.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from dspark.config import EngineConfig
from dspark.decoding.acceptance import Verdict
from dspark.engine.draft_link import DraftLink
from dspark.engine.judge import Judged, judge
from dspark.engine.pages import PagePool, page_keys
from dspark.engine.sequence import Sequence, pages_for
from dspark.errors import InvalidRequestError, OverloadedError
from dspark.kernels.attention_plan import PAGE_SIZE, plan_attention
from dspark.models.drafter import FeatureProjection
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.planner import plan_lengths
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.scheduling.survival import survival
from dspark.types import (
    BlockProposal,
    DraftWork,
    FinishReason,
    Request,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

# Features of a long prompt go to the drafter in pieces, so that no message grows without bound.
_MAX_FEATURE_ROWS = 512


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
        projection: FeatureProjection | None = None,
        link: DraftLink | None = None,
        block_size: int = 0,
        context_window: int = 0,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        if (projection is None) != (link is None):
            raise ValueError("a draft link needs the drafter's feature projection, and vice versa")
        self.target = target
        self.config = config
        self._times: RoundTimes | None = None
        self._gate: DraftGate | None = None
        self.eos_token_ids = eos_token_ids
        self._projection = projection
        self._link = link
        self._block_size = config.block_size or block_size
        self._context_window = context_window  # features before it are not missed; 0: all are
        self._plan = StepPlan(policy=VerificationPolicy(config.policy))
        self._plan_until = float("inf")
        pages = pages_for(config.cache_tokens) + 1
        self._pages = PagePool(pages)
        self._kv = PagedKVCache(pages, target.device)
        self._features: torch.Tensor | None = None  # [slots, d], beside the KV pages
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, Sequence] = {}  # in order of admission
        self._steps = 0
        self._forward_ended: float | None = None
        self._asked = False  # blocks have been asked for in the round that ends with the next step
        self.preemptions = 0
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.last_report: StepReport | None = None

    @property
    def table(self) -> StepTimeTable | None:
        """The step-time table; without one, `adaptive` verifies whole blocks."""
        return None if self._times is None else self._times.table

    @table.setter
    def table(self, table: StepTimeTable) -> None:
        self._times = RoundTimes(table)
        self._gate = DraftGate(self._times)

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; InvalidRequestError if it can never run, OverloadedError if full."""
        total = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids:
            raise InvalidRequestError(
                "the prompt is empty; send at least one token", param="prompt"
            )
        worst = max(request.prompt_token_ids), min(request.prompt_token_ids)
        if worst[0] >= self.target.vocab_size or worst[1] < 0:
            raise InvalidRequestError(
                f"prompt token ids must lie in 0..{self.target.vocab_size - 1}; got {worst}",
                param="prompt",
            )
        limit = min(self.target.max_positions, self._pages.total * PAGE_SIZE)
        if total > limit:
            raise InvalidRequestError(
                f"prompt ({len(request.prompt_token_ids)} tokens) and max_tokens "
                f"({request.sampling.max_tokens}) come to {total}, more than the context of "
                f"{limit}: shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if request.id in self._running or any(s.request.id == request.id for s in self._waiting):
            raise InvalidRequestError(f"request id {request.id!r} is in use already", param="id")
        if len(self._waiting) >= self.config.max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} requests wait already, the most that is allowed; retry later"
            )
        stops = frozenset(request.sampling.stop_token_ids) | frozenset(self.eos_token_ids)
        self._waiting.append(Sequence(request, stops))

    def abort(self, request_id: str) -> None:
        """Drop a request and all it holds; an unknown one is nothing to do."""
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            sequence = next((s for s in self._waiting if s.request.id == request_id), None)
            if sequence is None:
                return
            self._waiting.remove(sequence)
        sequence.finish_reason = FinishReason.ABORT
        self._let_go(sequence)

    def check_pages(self) -> None:
        """RuntimeError if a page is lost, or held otherwise than the requests believe."""
        self._pages.check(sequence.pages.tolist() for sequence in self._running.values())

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting)

    @property
    def load(self) -> tuple[int, int, int, int]:
        """Requests running, requests waiting, pages free, pages in all."""
        return len(self._running), len(self._waiting), self._pages.free, self._pages.total

    def set_plan(self, plan: StepPlan) -> None:
        """Follow `plan` until its validity ends, then the configuration again."""
        self._plan = plan
        self._plan_until = time.monotonic() + plan.valid_for_s

    # -- one step ---------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[VerificationResult]:
        """Advance every request; the tokens that each committed."""
        self._admit()
        if not self._running:
            return []
        started = time.perf_counter()
        self._collect()
        waited_ms = (time.perf_counter() - started) * 1e3
        self._make_room()
        turns = self._plan_turns()
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
        if self.config.prefix_cache:
            for turn in turns:
                self._name_pages(turn.sequence)
        self._ask_for_blocks([turn.sequence for turn in turns])
        for turn in turns:
            if turn.sequence.finish_reason is not None:
                del self._running[turn.sequence.request.id]
                self._let_go(turn.sequence)
        if self.config.check_pages:
            self.check_pages()
        if not self.has_work:
            self._forward_ended = None
        return results

    def _admit(self) -> None:
        """Start waiting requests in order while there is room for what they say already."""
        while self._waiting and len(self._running) < self.config.max_requests:
            sequence = self._waiting[0]
            # One page for each of the others to grow into, or the newcomer would soon be preempted.
            spare = len(self._running)
            if self._pages.free <= spare:
                return
            if self.config.prefix_cache:
                self._reuse(sequence)
            need = pages_for(len(sequence.tokens)) - len(sequence.pages)
            pages = self._pages.allocate(need) if self._pages.free >= need + spare else None
            if pages is None:
                self._pages.release(sequence.give_up())
                return
            sequence.hold(pages)
            self._waiting.popleft()
            self._running[sequence.request.id] = sequence
            self.cached_tokens += sequence.computed

    def _reuse(self, sequence: Sequence) -> None:
        """Begin after the pages that hold the same tokens already, features included.

        The last token is always computed anew: its logits decide what follows.
        """
        keys = page_keys(sequence.tokens[:-1])
        sequence.hold(self._pages.find(keys))
        sequence.keys = keys[: len(sequence.pages)]
        sequence.computed = len(sequence.pages) * PAGE_SIZE

    def _let_go(self, sequence: Sequence) -> None:
        """A request is over: its pages and its draft session."""
        self._pages.release(sequence.give_up())
        if self._link is not None:
            self._link.free([sequence.session])

    def _make_room(self) -> None:
        """Pages for all that this step may compute; the oldest requests come first."""
        for sequence in list(self._running.values()):
            if sequence.request.id not in self._running:
                continue  # preempted for an older one
            block = 0 if sequence.proposal is None else len(sequence.proposal.token_ids)
            need = pages_for(len(sequence.tokens) + block) - len(sequence.pages)
            while need > 0:
                pages = self._pages.allocate(need)
                if pages is not None:
                    sequence.hold(pages)
                    break
                newest = next(reversed(self._running.values()))
                self._preempt(newest)
                if newest is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.request.id]
        self._pages.release(sequence.give_up())
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _name_pages(self, sequence: Sequence) -> None:
        """Let others find the pages that this one has filled."""
        first = len(sequence.keys)
        for page, key in zip(
            sequence.pages[first:].tolist(), sequence.full_page_keys(), strict=False
        ):
            self._pages.name(page, key)

    def _collect(self) -> None:
        """Match proposals to the requests that want them; anything stale is dropped here."""
        if self._link is None:
            return
        wanted = {s.wanted_block for s in self._running.values() if s.wanted_block is not None}
        replies = self._link.collect(wanted)
        for proposal in replies.proposals:
            sequence = self._running.get(proposal.fence.session)
            if (
                sequence is not None
                and sequence.wanted_block == proposal.fence
                and self._usable(proposal, sequence)
            ):
                sequence.proposal = proposal
        for resync in replies.resyncs:
            sequence = self._running.get(resync.session)
            if sequence is not None and sequence.request.epoch == resync.epoch:
                sequence.sent_features = min(sequence.sent_features, resync.have_len)
        for sequence in self._running.values():
            sequence.wanted_block = None  # what has not come by now belongs to a past round

    def _usable(self, proposal: BlockProposal, sequence: Sequence) -> bool:
        """Whether a block can be verified: known tokens, no more than asked for, and its law."""
        tokens, sampling = proposal.token_ids, sequence.request.sampling
        needs_law = sampling.mode is VerifyMode.REJECTION and not sampling.greedy
        return (
            0 < len(tokens) < sequence.remaining
            and int(tokens.min()) >= 0
            and int(tokens.max()) < self.target.vocab_size
            and not (needs_law and proposal.candidate_ids is None)
        )

    def _plan_turns(self) -> list[_Turn]:
        """Who takes part, and with how many rows."""
        running = list(self._running.values())
        decoding = [s for s in running if s.decoding and s.computed]
        turns: list[_Turn] = []
        budget = self._prefill_budget(len(decoding))
        for sequence in running:
            if sequence.decoding and sequence.computed:
                continue
            rows = min(len(sequence.tokens) - sequence.computed, budget)
            if rows:
                budget -= rows
                end = sequence.computed + rows
                turns.append(_Turn(sequence, rows, 0, end == len(sequence.tokens)))
        prefill = sum(turn.rows for turn in turns)
        lengths = self._plan_verification(decoding, prefill)
        turns += [_Turn(s, n + 1, n, True) for s, n in zip(decoding, lengths, strict=True)]
        return turns

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
        if plan.policy is VerificationPolicy.OFF:
            return [0] * len(decoding)
        times, gate = self._times, self._gate
        if plan.policy is VerificationPolicy.FIXED or times is None or gate is None:
            return sizes
        survivals = [
            np.zeros(0, dtype=np.float32)
            if block is None
            else survival(block.confidences, plan.confidence_temperatures)
            for block in blocks
        ]
        gate.record([block for block in survivals if len(block)])
        return plan_lengths(
            survivals,
            lambda tokens: times.round_ms(len(decoding), tokens),
            extra_tokens=prefill,
            max_draft_tokens=plan.max_draft_tokens,
        )

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
        device = self.target.device
        plan = plan_attention(
            [turn.sequence.pages for turn in turns],
            [turn.sequence.computed for turn in turns],
            [turn.rows for turn in turns],
            device,
        )
        batch = TargetBatch(
            token_ids=torch.tensor(tokens, device=device),
            attention=plan,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )
        out = self.target.forward(batch, self._kv)
        if self._projection is not None and out.taps is not None:
            self._keep_features(out.taps, plan.slots)
        emitting = [i for i, turn in enumerate(turns) if turn.emits]
        judged = [
            Judged(turns[i].sequence.request, turns[i].sequence.fence(),
                   turns[i].sequence.proposal, turns[i].verified)
            for i in emitting
        ]  # fmt: skip
        return dict(zip(emitting, judge(out.logits, judged), strict=True))

    def _keep_features(self, taps: torch.Tensor, slots: torch.Tensor) -> None:
        """Project tapped rows and keep them in pages; rows of refused drafts get overwritten."""
        assert self._projection is not None
        features = self._projection(taps)
        if self._features is None:
            self._features = features.new_zeros(self._kv.num_slots, features.shape[-1])
        self._features.index_copy_(0, slots, features)

    def _commit(self, turn: _Turn, verdict: Verdict) -> VerificationResult:
        sequence, proposal = turn.sequence, turn.sequence.proposal
        drafted = 0 if proposal is None else len(proposal.token_ids)
        emitted = [] if proposal is None else proposal.token_ids[: verdict.accepted].tolist()
        kept = sequence.commit([*emitted, verdict.next_token_id])
        sequence.computed = len(sequence.tokens) - 1
        sequence.round += 1
        sequence.proposal = None
        return VerificationResult(
            request_id=sequence.request.id,
            token_ids=kept,
            drafted=drafted,
            verified=turn.verified,
            accepted=min(verdict.accepted, len(kept)),
            finish_reason=sequence.finish_reason,
        )

    # -- drafting -----------------------------------------------------------------------------

    def _ask_for_blocks(self, sequences: list[Sequence]) -> None:
        """Send new features and anchors, where a block can still be of use."""
        link, plan = self._link, self._current_plan()
        if link is None or not link.available or plan.policy is VerificationPolicy.OFF:
            return
        adaptive = plan.policy is VerificationPolicy.ADAPTIVE
        if adaptive and self._gate is not None and not self._gate.open(len(self._running)):
            return  # features wait in their pages and go out when drafting resumes
        works: list[DraftWork] = []
        for sequence in sequences:
            size = min(plan.block_size or self._block_size, sequence.remaining - 1)
            live = sequence.finish_reason is None and sequence.request.sampling.speculate
            if live and sequence.decoding and sequence.computed and size > 0:
                works += self._works(sequence, size)
        if works:
            self._asked = True
            link.submit(works)

    def _works(self, sequence: Sequence, size: int) -> list[DraftWork]:
        assert self._features is not None
        fence = sequence.fence()
        works = []
        start = sequence.sent_features
        if self._context_window:
            start = max(start, sequence.computed - self._context_window)
        while True:
            end = min(start + _MAX_FEATURE_ROWS, sequence.computed)
            last = end == sequence.computed
            works.append(
                DraftWork(
                    fence=fence,
                    feature_start=start,
                    features=self._features[torch.from_numpy(sequence.slots(start, end))],
                    anchor_token_id=sequence.tokens[-1],
                    block_size=size if last else 0,
                    sampling=sequence.request.sampling,
                )
            )
            start = end
            if last:
                break
        sequence.sent_features = sequence.computed
        sequence.wanted_block = fence
        return works

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
        asked, self._asked = self._asked, False
        decode = [turn for turn in turns if turn.emits]
        drafted = sum(result.drafted for result in results)
        prefill = sum(turn.rows for turn in turns) - sum(turn.logit_rows for turn in turns)
        if self._times is not None and decode and not prefill and round_ms is not None:
            self._times.record(
                requests=len(decode),
                tokens=sum(turn.rows for turn in turns),
                drafted=asked,
                step_ms=step_ms,
                round_ms=round_ms,
            )
        width = self._block_size
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
        )


def _by_position(lengths: list[int], width: int) -> tuple[int, ...]:
    """How many requests reached each block position."""
    return tuple(sum(length > k for length in lengths) for k in range(width))
