"""Blocks of a drafter whose confidences are off by known temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from dspark.types import BlockOutcomes, DoubleArray, IntArray


@cache
def traffic(
    count: int, temperatures: Sequence[float], seed: int = 0
) -> tuple[DoubleArray, IntArray]:  # [N, γ], [N]
    """Raw confidences, which these temperatures mend, and how many tokens would stand."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(1.5, 1.5, (count, len(temperatures)))
    stands = rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
    raw = 1 / (1 + np.exp(-logit * np.array(temperatures)))
    return raw, np.cumprod(stands, axis=1).sum(axis=1)


def outcomes(
    count: int,
    temperatures: Sequence[float],
    *,
    seed: int = 0,
    in_use: tuple[float, ...] = (),
) -> BlockOutcomes:
    """The same, verified in full, as a verifier would tell."""
    raw, stood = traffic(count, temperatures, seed)
    return BlockOutcomes(raw.astype(np.float32), np.full(count, raw.shape[1]), stood, in_use)
