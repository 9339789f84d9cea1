"""Survival probabilities (paper §3.2): a_j = Π_{i≤j} c_i, of calibrated confidences c_i."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dspark.types import RAW_SCALE, RAW_SCALES, BoolArray, DoubleArray, FloatArray, Scale, Scales

ABSENT = np.float32(-1.0)  # in a table of survivals: the block has no token there
_FEW = 8  # draft tokens in all, up to which numpy costs more than it saves
_EPS = 1e-6


def survival(
    confidences: FloatArray,  # [..., γ] raw
    scale: Scale = RAW_SCALE,
) -> FloatArray:  # [..., γ], never increasing
    """Chance that each draft token and all before it are accepted."""
    if scale == RAW_SCALE:
        return _survival(confidences)
    return _survival(confidences, _factors(scale, np.shape(confidences)[-1]))


def survivals_of(
    confidences: FloatArray,  # [N, γ] raw
    greedy: BoolArray | Sequence[bool],  # [N]
    scales: Scales,
) -> FloatArray:  # [N, γ]
    """The same of requests of both kinds."""
    if scales == RAW_SCALES:
        return _survival(confidences)
    width, kind = confidences.shape[1], np.asarray(greedy, dtype=np.bool_)
    of_kinds = [_factors(scale, width) for scale in (scales.sampled, scales.greedy)]
    if kind.all() or not kind.any():
        return _survival(confidences, of_kinds[bool(kind.any())])
    powers, odds = (np.stack(both)[kind.astype(np.int64)] for both in zip(*of_kinds, strict=True))
    return _survival(confidences, (powers, odds))


def survival_table(
    blocks: Sequence[FloatArray],  # R ≥ 1 confidences, [γ_r] each, raw; none without a block
    greedy: Sequence[bool] = (),  # R, whether the request is; empty: none is
    scales: Scales = RAW_SCALES,
) -> FloatArray:  # [R, max γ_r]
    """Survivals of many blocks at once, ABSENT past a block's end."""
    sizes = [len(block) for block in blocks]
    greedy = greedy or [False] * len(blocks)
    if sum(sizes) <= _FEW:
        return _few(blocks, greedy, scales, max(sizes))
    if sizes.count(sizes[0]) == len(sizes):  # as mostly: nothing is absent
        return survivals_of(np.array(blocks), greedy, scales)
    there = np.arange(max(sizes)) < np.array(sizes)[:, None]
    confidences = np.ones(there.shape, dtype=np.float32)
    confidences[there] = np.concatenate(blocks)
    return np.where(there, survivals_of(confidences, greedy, scales), ABSENT)


def _survival(
    confidences: FloatArray, factors: tuple[DoubleArray, DoubleArray] | None = None
) -> FloatArray:
    calibrated = np.clip(np.asarray(confidences, dtype=np.float64), _EPS, 1.0 - _EPS)
    if factors is not None:
        # σ(logit / T + b), with fewer steps: the odds to the power of 1 / T, times e^b
        powers, odds = factors
        good = calibrated**powers * odds
        calibrated = good / (good + (1.0 - calibrated) ** powers)
    return np.cumprod(calibrated, axis=-1).astype(np.float32)


@lru_cache(maxsize=16)  # the same ones at each step
def _factors(scale: Scale, width: int) -> tuple[DoubleArray, DoubleArray]:  # [γ] each
    """1 / T and e^b by position."""
    powers, odds = np.ones(width), np.ones(width)
    powers[: len(scale.temperatures)] = 1.0 / np.array(scale.temperatures[:width])
    odds[: len(scale.biases)] = np.exp(scale.biases[:width])
    return powers, odds


def _few(
    blocks: Sequence[FloatArray], greedy: Sequence[bool], scales: Scales, width: int
) -> FloatArray:
    """The same, where calls of numpy would cost more than they do."""
    kinds = [_few_factors(scale, width) for scale in (scales.sampled, scales.greedy)]
    table = []
    for block, kind in zip(blocks, greedy, strict=True):
        row, survives = [], 1.0
        for confidence, (power, odds) in zip(block.tolist(), kinds[kind], strict=False):
            good = min(max(confidence, _EPS), 1.0 - _EPS)
            if (power, odds) != (1.0, 1.0):
                bad = (1.0 - good) ** power
                good = good**power * odds
                good /= good + bad
            survives *= good
            row.append(survives)
        table.append(row + [float(ABSENT)] * (width - len(row)))
    return np.array(table, dtype=np.float32)


@lru_cache(maxsize=16)
def _few_factors(scale: Scale, width: int) -> list[tuple[float, float]]:
    powers, odds = _factors(scale, width)
    return list(zip(powers.tolist(), odds.tolist(), strict=True))


def logits(confidences: DoubleArray) -> DoubleArray:
    """log(c / (1 - c)), finite also for a c of 0 or 1."""
    inner = np.clip(confidences, _EPS, 1.0 - _EPS)
    return np.asarray(np.log(inner / (1.0 - inner)))
