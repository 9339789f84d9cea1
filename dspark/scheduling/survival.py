"""Survival probabilities (paper §3.2): a_j = Π_{i≤j} c_i, calibrated by temperature (STS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.types import DoubleArray, FloatArray

ABSENT = np.float32(-1.0)  # in a table of survivals: the block has no token there
_EPS = 1e-6


def survival(
    confidences: FloatArray,  # [..., γ]
    temperatures: Sequence[float] = (),  # by position; missing ones are 1
) -> FloatArray:  # [..., γ], never increasing
    """Chance that each draft token and all before it are accepted."""
    calibrated = np.clip(np.asarray(confidences, dtype=np.float64), _EPS, 1.0 - _EPS)
    if len(temperatures):
        scale = np.ones(calibrated.shape[-1])
        scale[: len(temperatures)] = temperatures[: len(scale)]
        calibrated = tempered(logits(calibrated), scale)
    return np.cumprod(calibrated, axis=-1).astype(np.float32)


def survival_table(
    blocks: Sequence[FloatArray],  # R confidences, [γ_r] each; none of a request without a block
    temperatures: Sequence[float] = (),
) -> FloatArray:  # [R, max γ_r]
    """Survivals of many blocks at once, ABSENT past a block's end."""
    sizes = np.fromiter(map(len, blocks), dtype=np.int64, count=len(blocks))
    there = np.arange(sizes.max(initial=0)) < sizes[:, None]
    confidences = np.ones(there.shape, dtype=np.float32)
    if there.any():
        confidences[there] = np.concatenate(blocks)
    return np.where(there, survival(confidences, temperatures), ABSENT)


def logits(confidences: DoubleArray) -> DoubleArray:
    """log(c / (1 - c)), finite also for a c of 0 or 1."""
    inner = np.clip(confidences, _EPS, 1.0 - _EPS)
    return np.asarray(np.log(inner / (1.0 - inner)))


def tempered(confidence_logits: DoubleArray, temperature: float | DoubleArray) -> DoubleArray:
    """σ(logit / T): a confidence at another temperature."""
    return np.asarray(1.0 / (1.0 + np.exp(-confidence_logits / temperature)))
