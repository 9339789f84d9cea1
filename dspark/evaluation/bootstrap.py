"""Intervals by bootstrap over prompts, since the rounds of one answer are alike.

A measure is computed for the sample and for B draws of as many prompts, with replacement, at once:
every statistic is an array [1+B, …] whose first row is the sample's. Sums over prompts become sums
over drawn prompts by one product with the draws' weights, so nothing is drawn row by row. Measures
of the same prompts share their weights; ratios and differences of them are therefore paired.

Shape symbols: B draws, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark.types import DoubleArray, IntArray

DRAWS = 1000  # B
LEVEL = 0.95
_LEAST_DEFINED = 0.95  # of the draws; where a measure lacks data in more, no interval is given


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, its interval at LEVEL, and how many cases it is of; None: it cannot be told."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def prompt_weights(prompts: int, seed: int = 0) -> DoubleArray:  # [1+B, P]
    """How often each prompt is in the sample (once) and in each draw.

    One prompt says nothing about others: its draws are NaN, and so are the intervals of them.
    """
    if prompts < 2:
        return np.vstack([np.ones((1, prompts)), np.full((DRAWS, prompts), np.nan)])
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS)
    return np.vstack([np.ones((1, prompts)), drawn])


def totals(
    weights: DoubleArray,  # [1+B, P]
    sums: npt.NDArray[Any],  # [P, …]
) -> DoubleArray:  # [1+B, …]
    """Sums by prompt, summed over the sample and over each draw."""
    return np.asarray(np.tensordot(weights, sums, axes=1))


def ratio(part: DoubleArray, whole: DoubleArray) -> DoubleArray:
    """part / whole; NaN where there is nothing to divide by."""
    out = np.full(np.shape(part), np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def estimate(statistic: DoubleArray, n: int) -> Estimate:  # [1+B]
    """The sample's value, and the percentile interval of the draws'."""
    value, drawn = float(statistic[0]), statistic[1:]
    if np.isnan(value):
        return Estimate(None, None, None, n)
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < _LEAST_DEFINED * len(drawn):
        return Estimate(value, None, None, n)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Estimate(value, float(low), float(high), n)


def estimates(
    statistic: DoubleArray,  # [1+B, m]
    n: IntArray,  # [m]
) -> tuple[Estimate, ...]:
    """One of each column."""
    return tuple(estimate(column, int(k)) for column, k in zip(statistic.T, n, strict=True))
