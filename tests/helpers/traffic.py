"""Blocks of a drafter whose confidences are off by a known scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from dspark.types import RAW_SCALES, BlockOutcomes, DoubleArray, IntArray, Scale, Scales


def alike(temperatures: Sequence[float], biases: Sequence[float] | None = None) -> Scales:
    """One scale for both kinds of requests; biases are 0 where none are given."""
    scale = Scale(tuple(temperatures), tuple(biases or [0.0] * len(temperatures)))
    return Scales(scale, scale)


@cache
def traffic(
    count: int,
    temperatures: tuple[float, ...],
    seed: int = 0,
    biases: tuple[float, ...] = (),
) -> tuple[DoubleArray, IntArray]:  # [N, γ], [N]
    """Raw confidences, which this scale mends, and how many tokens would stand."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(1.5, 1.5, (count, len(temperatures)))
    stands = rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
    raw = 1 / (1 + np.exp(-(logit - np.array(biases or 0.0)) * np.array(temperatures)))
    return raw, np.cumprod(stands, axis=1).sum(axis=1)


def outcomes(
    count: int,
    temperatures: tuple[float, ...],
    *,
    seed: int = 0,
    greedy: bool = False,
    in_use: Scales = RAW_SCALES,
) -> BlockOutcomes:
    """The same, verified in full, as a verifier would tell."""
    raw, stood = traffic(count, temperatures, seed)
    kinds = np.full(count, greedy)
    return BlockOutcomes(raw.astype(np.float32), np.full(count, raw.shape[1]), stood, kinds, in_use)
