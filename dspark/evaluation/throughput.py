"""Tokens a second at several concurrencies: no drafting, blocks of fixed lengths, and adaptive.

So many users are served at once, each asking again as soon as it is answered, while the arms take
short turns, in another order each round. A machine whose speed drifts, by the second where others
share it, then favours none, nor do prompts that come in step with the turns; and a round's ratios
say more than any arm's speed.

Tokens, accepted length, steps' and blocks' times predict a speed: R·τ / (T_step + T_draft). What is
reached of it, the efficiency, is what neither step nor draft has to answer for.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark.engine.verifier import VerifierEngine
from dspark.types import Request, SamplingParams, StepPlan, VerificationPolicy, VerificationResult

_FOR_LONG_S = 3600.0


def arms(fixed_lengths: Sequence[int] = (0,)) -> dict[str, StepPlan]:
    """What is compared, by name; a fixed length of 0 is the drafter's own γ."""
    plans = {"off": StepPlan(policy=VerificationPolicy.OFF, valid_for_s=_FOR_LONG_S)}
    for length in fixed_lengths:
        plans[f"fixed {length}" if length else "fixed"] = StepPlan(
            policy=VerificationPolicy.FIXED, block_size=length, valid_for_s=_FOR_LONG_S
        )
    plans["adaptive"] = StepPlan(policy=VerificationPolicy.ADAPTIVE, valid_for_s=_FOR_LONG_S)
    return plans


@dataclass(frozen=True, slots=True)
class ThroughputCell:
    """One arm at one concurrency: medians over rounds."""

    concurrency: int
    arm: str
    tokens_per_s: float
    against_off: float  # of the tokens a second of the same round
    accepted_length: float
    verified_per_step: float  # draft tokens let into the forward, a request and step
    efficiency: float  # share of the time spent in target steps and drafting
    rounds: int


def measure(
    verifier: VerifierEngine,
    prompts: Sequence[tuple[int, ...]],  # token ids
    *,
    concurrencies: Sequence[int],
    max_tokens: int,
    rounds: int,
    fixed_lengths: Sequence[int] = (0,),
    turn_s: float = 1.0,
    settle_s: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ThroughputCell]:
    """Greedy answers of exactly `max_tokens` to `prompts` in turn, whatever stop tokens come.

    `settle_s`: how long adaptive may learn of each concurrency before turns are counted.
    """
    cells = []
    plans = arms(fixed_lengths)
    total, done = len(concurrencies) * rounds * len(plans), 0
    shuffled = random.Random(0)
    stops, verifier.eos_token_ids = verifier.eos_token_ids, ()
    try:
        for concurrency in concurrencies:
            users = Users(verifier, prompts, concurrency, max_tokens)
            if settle_s:
                verifier.set_plan(plans["adaptive"])
                users.work(settle_s)
            turns: dict[str, list[Turn]] = {arm: [] for arm in plans}
            for _ in range(rounds):
                for arm, plan in shuffled.sample(list(plans.items()), len(plans)):
                    verifier.set_plan(plan)
                    turns[arm].append(users.work(turn_s))
                    done += 1
                    on_progress(done, total)
            users.leave()
            for arm, of_arm in turns.items():
                ratios = [
                    turn.tokens_per_s / off.tokens_per_s
                    for turn, off in zip(of_arm, turns["off"], strict=True)
                ]
                cells.append(
                    ThroughputCell(
                        concurrency,
                        arm,
                        statistics.median(turn.tokens_per_s for turn in of_arm),
                        statistics.median(ratios),
                        statistics.median(turn.accepted_length for turn in of_arm),
                        statistics.median(turn.verified_per_step for turn in of_arm),
                        statistics.median(turn.efficiency for turn in of_arm),
                        rounds,
                    )
                )
    finally:
        verifier.eos_token_ids = stops
        verifier.set_plan(StepPlan(valid_for_s=0.0))
    return cells


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one arm's turn."""

    tokens_per_s: float
    accepted_length: float
    verified_per_step: float
    efficiency: float


class Users:
    """So many requests are always under way, none begun at the same time as another."""

    def __init__(
        self,
        verifier: VerifierEngine,
        prompts: Sequence[tuple[int, ...]],
        count: int,
        max_tokens: int,
    ) -> None:
        self._verifier = verifier
        self._prompts = itertools.cycle(prompts)
        self._max_tokens = max_tokens
        self._names = map(str, itertools.count())
        self._live: set[str] = set()
        for i in range(count):
            self._ask(max(1, max_tokens * (i + 1) // count))
        while self._verifier.load[1]:
            self._step()

    def _ask(self, max_tokens: int) -> None:
        name = next(self._names)
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        self._verifier.add(Request(name, next(self._prompts), sampling))
        self._live.add(name)

    def _step(self) -> list[VerificationResult]:
        results = self._verifier.step()
        for result in results:
            if result.finish_reason is not None:
                self._live.remove(result.request_id)
                self._ask(self._max_tokens)
        return results

    def work(self, seconds: float) -> Turn:
        """Serve for about so long."""
        self._step()  # what the arm before has asked for is not this one's
        tokens = verified = steps = 0
        drafted_s, stepped_ms = self._verifier.drafting_s, 0.0
        started = time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            for result in self._step():
                tokens += len(result.token_ids)
                verified += result.verified
                steps += 1
            report = self._verifier.last_report
            assert report is not None
            stepped_ms += report.step_ms
        busy_s = self._verifier.drafting_s - drafted_s + stepped_ms / 1e3
        return Turn(tokens / took, tokens / steps, verified / steps, busy_s / took)

    def leave(self) -> None:
        """Drop what is under way."""
        for name in self._live:
            self._verifier.abort(name)
