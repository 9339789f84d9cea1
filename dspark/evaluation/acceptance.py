"""Accepted length and acceptance by position, from generations (paper §4).

τ counts the tokens of a step, the target's own included; the step that ends the prompt is left out,
since nothing can be drafted for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.engine.llm import Generation

_BOOTSTRAP = 1000


@dataclass(frozen=True, slots=True)
class AcceptanceReport:
    """How drafting did over a set of prompts."""

    prompts: int
    tokens: int
    accepted_length: float  # τ, over all steps
    interval: tuple[float, float]  # 95 %, bootstrap over prompts
    drafted: int
    verified: int
    accepted: int
    by_position: tuple[float, ...]  # P(accepted | verified and all before accepted)
    verified_by_position: tuple[int, ...]


def report(generations: Sequence[Generation]) -> AcceptanceReport:
    """Summarise generations of one run."""
    width = max((max(g.verified_lengths, default=0) for g in generations), default=0)
    verified, accepted = [0] * width, [0] * width
    for generation in generations:
        pairs = zip(generation.verified_lengths, generation.accepted_lengths, strict=True)
        for length, stood in pairs:
            for k in range(length):
                if k <= stood:  # later positions of a refused block were never put to the test
                    verified[k] += 1
                    accepted[k] += k < stood
    counts = [(len(g.token_ids) - 1, g.steps - 1) for g in generations if g.steps > 1]
    return AcceptanceReport(
        prompts=len(generations),
        tokens=sum(len(g.token_ids) for g in generations),
        accepted_length=_ratio(counts),
        interval=_interval(counts),
        drafted=sum(g.drafted for g in generations),
        verified=sum(g.verified for g in generations),
        accepted=sum(g.accepted for g in generations),
        by_position=tuple(a / v if v else 0.0 for a, v in zip(accepted, verified, strict=True)),
        verified_by_position=tuple(verified),
    )


def _ratio(counts: Sequence[tuple[int, int]]) -> float:
    steps = sum(s for _, s in counts)
    return sum(t for t, _ in counts) / steps if steps else 0.0


def _interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    if not counts:
        return (0.0, 0.0)
    rng = random.Random(0)
    means = sorted(_ratio(rng.choices(counts, k=len(counts))) for _ in range(_BOOTSTRAP))
    return means[int(0.025 * _BOOTSTRAP)], means[int(0.975 * _BOOTSTRAP) - 1]
