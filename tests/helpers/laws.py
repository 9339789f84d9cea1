"""What the target's law is, by transformers alone, and whether tokens follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from dspark.types import DoubleArray, IntArray, SamplingParams


def next_law(model: Any, ids: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Of the token behind each position: [B, L] -> [B, L, V], in double precision."""
    with torch.inference_mode():
        logits = model(ids).logits
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.flatten(0, 1))
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return torch.softmax(scores.double(), -1).view_as(logits)


def fit_given_the_past(tokens: Sequence[int], laws: DoubleArray) -> float:  # [N], [N, V]
    """p-value of tokens, each against its law given all before it.

    By which tokens they are, and by how likely each was beside the others: likeliest, second, ….
    """
    drawn = np.array(tokens)
    order = np.argsort(-laws, axis=1)
    places = np.argmax(order == drawn[:, None], axis=1)
    ranked = np.take_along_axis(laws, order, axis=1)
    return min(1.0, 2.0 * min(_chi_square(drawn, laws), _chi_square(places, ranked)))


def _chi_square(cells: IntArray, laws: DoubleArray) -> float:  # [N], [N, C]
    """However what is drafted hangs on the past, counts less their expectations are a martingale.

    Its variance is known; its square in that is χ² of one degree of freedom fewer than cells.
    """
    size = laws.shape[1]
    surplus = (np.eye(size)[cells] - laws).sum(axis=0)
    variance = np.diag(laws.sum(axis=0)) - laws.T @ laws
    return float(stats.chi2.sf(surplus @ np.linalg.pinv(variance) @ surplus, size - 1))
