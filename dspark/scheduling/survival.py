"""Survival probabilities (paper §3.2): a_j = Π_{i≤j} c_i, calibrated by temperature (STS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.types import DoubleArray, FloatArray

ABSENT = np.float32(-1.0)  # in a table of survivals: the block has no token there
FEW = 64  # draft tokens in all, up to which numpy costs more than it saves
_EPS = 1e-6


def survival(
    confidences: FloatArray,  # [..., γ]
    temperatures: Sequence[float] = (),  # by position; missing ones are 1
) -> FloatArray:  # [..., γ], never increasing
    """Chance that each draft token and all before it are accepted."""
    calibrated = np.clip(np.asarray(confidences, dtype=np.float64), _EPS, 1.0 - _EPS)
    if len(temperatures):
        power = np.ones(calibrated.shape[-1])
        power[: len(temperatures)] = temperatures[: len(power)]
        np.divide(1.0, power, out=power)
        # σ(logit / T), with fewer steps: the odds to the power of 1 / T
        good = calibrated**power
        calibrated = good / (good + (1.0 - calibrated) ** power)
    return np.cumprod(calibrated, axis=-1).astype(np.float32)


def survival_table(
    blocks: Sequence[FloatArray],  # R ≥ 1 confidences, [γ_r] each; none without a block
    temperatures: Sequence[float] = (),
) -> FloatArray:  # [R, max γ_r]
    """Survivals of many blocks at once, ABSENT past a block's end."""
    sizes = [len(block) for block in blocks]
    if sum(sizes) <= FEW:
        return _few(blocks, max(sizes), temperatures)
    if sizes.count(sizes[0]) == len(sizes):  # as mostly: nothing is absent
        return survival(np.array(blocks), temperatures)
    there = np.arange(max(sizes)) < np.array(sizes)[:, None]
    confidences = np.ones(there.shape, dtype=np.float32)
    confidences[there] = np.concatenate(blocks)
    return np.where(there, survival(confidences, temperatures), ABSENT)


def _few(blocks: Sequence[FloatArray], width: int, temperatures: Sequence[float]) -> FloatArray:
    """The same, where calls of numpy would cost more than they do."""
    powers = [1.0 / t for t in temperatures[:width]]
    powers += [1.0] * (width - len(powers))
    table = []
    for block in blocks:
        row, survives = [], 1.0
        for confidence, power in zip(block.tolist(), powers, strict=False):
            good = min(max(confidence, _EPS), 1.0 - _EPS)
            if power != 1.0:
                bad = (1.0 - good) ** power
                good **= power
                good /= good + bad
            survives *= good
            row.append(survives)
        table.append(row + [float(ABSENT)] * (width - len(row)))
    return np.array(table, dtype=np.float32)


def logits(confidences: DoubleArray) -> DoubleArray:
    """log(c / (1 - c)), finite also for a c of 0 or 1."""
    inner = np.clip(confidences, _EPS, 1.0 - _EPS)
    return np.asarray(np.log(inner / (1.0 - inner)))


def tempered(confidence_logits: DoubleArray, temperature: float | DoubleArray) -> DoubleArray:
    """σ(logit / T): a confidence at another temperature."""
    return np.asarray(1.0 / (1.0 + np.exp(-confidence_logits / temperature)))
