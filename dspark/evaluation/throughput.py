"""Tokens a second at several concurrencies, with drafting off, fixed and adaptive, in turn.

The arms take turns within each round (off, fixed, adaptive, off, …), so that a machine whose speed
drifts favours none, and the medians of the rounds are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark.engine.llm import LLM
from dspark.types import SamplingParams, StepPlan, VerificationPolicy

ARMS = (VerificationPolicy.OFF, VerificationPolicy.FIXED, VerificationPolicy.ADAPTIVE)


@dataclass(frozen=True, slots=True)
class ThroughputCell:
    """One arm at one concurrency: medians over rounds."""

    concurrency: int
    arm: str
    tokens_per_s: float
    accepted_length: float
    verified_per_step: float  # draft tokens let into the forward, a request and step
    rounds: int


def measure(
    llm: LLM,
    prompts: Sequence[str],
    *,
    concurrencies: Sequence[int],
    max_tokens: int,
    rounds: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ThroughputCell]:
    """Greedy generations to exactly `max_tokens`, prompts repeated to fill a concurrency.

    Stop tokens are ignored, so that every arm does the same work; timed from the first prompt's
    arrival to the last token, prefill included.
    """
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    cells = []
    total, done = len(concurrencies) * rounds * len(ARMS), 0
    stops, llm.verifier.eos_token_ids = llm.verifier.eos_token_ids, ()
    try:
        for concurrency in concurrencies:
            batch = [prompts[i % len(prompts)] for i in range(concurrency)]
            samples: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
            for _ in range(rounds):
                for arm in ARMS:
                    llm.verifier.set_plan(StepPlan(policy=arm, valid_for_s=3600.0))
                    samples[arm].append(_one(llm, batch, sampling))
                    done += 1
                    on_progress(done, total)
            for arm in ARMS:
                speed, length, verified = (
                    statistics.median(column) for column in zip(*samples[arm], strict=True)
                )
                cells.append(ThroughputCell(concurrency, arm, speed, length, verified, rounds))
    finally:
        llm.verifier.eos_token_ids = stops
        llm.verifier.set_plan(StepPlan(valid_for_s=0.0))
    return cells


def _one(llm: LLM, batch: list[str], sampling: SamplingParams) -> tuple[float, float, float]:
    started = time.perf_counter()
    generations = llm.generate(batch, sampling)
    took = time.perf_counter() - started
    tokens = sum(len(g.token_ids) for g in generations)
    steps = sum(g.steps - 1 for g in generations)
    return (
        tokens / took,
        (tokens - len(generations)) / max(1, steps),
        sum(g.verified for g in generations) / max(1, steps),
    )
