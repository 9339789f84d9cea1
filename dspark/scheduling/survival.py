"""Survival probabilities (paper §3.2): a_j = Π_{i≤j} c_i, calibrated by temperature (STS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.types import FloatArray

_EPS = 1e-6


def survival(
    confidences: FloatArray,  # [γ]
    temperatures: Sequence[float] = (),  # by position; missing ones are 1
) -> FloatArray:  # [γ], never increasing
    """Chance that each draft token and all before it are accepted."""
    calibrated = np.clip(np.asarray(confidences, dtype=np.float64), _EPS, 1.0 - _EPS)
    if len(temperatures):
        scale = np.ones(len(calibrated))
        scale[: len(temperatures)] = temperatures[: len(calibrated)]
        logit = np.log(calibrated / (1.0 - calibrated))
        calibrated = 1.0 / (1.0 + np.exp(-logit / scale))
    return np.cumprod(calibrated).astype(np.float32)
