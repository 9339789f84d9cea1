"""Whether survival probabilities come true (paper §3.2.1 and §4.3.3, Figure 6).

A forecast is the survival a_k of a draft token that was verified, its outcome whether the token and
all before it were accepted.

    ECE     mean distance, weighted by cases, between what a bin's forecasts promise and what came;
            bins of equal mass, as scales are judged by (dspark.scheduling.calibration)
    Brier   mean squared distance of forecast and outcome
    AUC     chance that what was accepted had the higher forecast than what was not; ties count half

Statistics are arrays [1+B, …], as dspark.evaluation.bootstrap has them. Shape symbols: B draws,
P prompts, N rounds, γ block size, M forecasts, E bins.

The diagram's bins are of equal width, as the paper's are, so that it shows where forecasts lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark.evaluation.bootstrap import ratio, totals
from dspark.evaluation.rounds import Rounds
from dspark.scheduling.calibration import BINS, mass_bins
from dspark.types import DoubleArray, IntArray


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Forecasts with their outcomes, of one position or of all."""

    prompts: int  # P
    prompt: IntArray  # [M]
    predicted: DoubleArray  # [M]
    outcome: IntArray  # [M] 0 or 1


def forecasts(
    rounds: Rounds,
    survivals: DoubleArray,  # [N, γ]
    position: int | None = None,  # from 0; None: all
) -> Forecasts:
    """What was forecast of verified draft tokens."""
    columns = slice(None) if position is None else slice(position, position + 1)
    rows, offsets = np.nonzero(rounds.judged[:, columns])
    return Forecasts(
        rounds.prompts,
        rounds.prompt[rows],
        survivals[:, columns][rows, offsets].astype(np.float64),
        rounds.stood[:, columns][rows, offsets].astype(np.int64),
    )


@dataclass(frozen=True, slots=True)
class Diagram:
    """Forecasts by their size; bin e of E holds [e/E, (e+1)/E), the last one 1 as well."""

    predicted: DoubleArray  # [1+B, E] mean forecast; NaN: an empty bin
    observed: DoubleArray  # [1+B, E] share that was accepted
    share: DoubleArray  # [1+B, E] of all forecasts
    n: IntArray  # [E]


def reliability_diagram(given: Forecasts, weights: DoubleArray) -> Diagram:  # [1+B, P]
    """What forecasts of each size promise, and what came of them."""
    place = np.minimum((given.predicted * BINS).astype(np.int64), BINS - 1)
    counts, predicted, observed = _binned(given, place, weights)
    return Diagram(
        predicted=ratio(predicted, counts),
        observed=ratio(observed, counts),
        share=ratio(counts, np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)),
        n=np.bincount(place, minlength=BINS),
    )


def calibration_error(given: Forecasts, weights: DoubleArray) -> DoubleArray:  # [1+B, P] -> [1+B]
    """ECE, over the sample's bins in every draw."""
    counts, predicted, observed = _binned(given, mass_bins(given.predicted), weights)
    return ratio(np.abs(observed - predicted).sum(axis=1), counts.sum(axis=1))


def brier_score(given: Forecasts, weights: DoubleArray) -> DoubleArray:  # [1+B, P] -> [1+B]
    """Mean squared distance of forecast and outcome."""
    squares = (given.predicted - given.outcome) ** 2
    sums = np.stack(
        [
            np.bincount(given.prompt, squares, minlength=given.prompts),
            np.bincount(given.prompt, minlength=given.prompts),
        ],
        axis=1,
    )
    drawn = totals(weights, sums)
    return ratio(drawn[:, 0], drawn[:, 1])


def auc(given: Forecasts, weights: DoubleArray) -> DoubleArray:  # [1+B, P] -> [1+B]
    """Area under the ROC curve, as the share of pairs in the right order; NaN without pairs."""
    wins = _wins(given)
    won = ((weights @ wins) * weights).sum(axis=1)
    hits = np.bincount(given.prompt[given.outcome == 1], minlength=given.prompts)
    misses = np.bincount(given.prompt[given.outcome == 0], minlength=given.prompts)
    return ratio(won, (weights @ hits) * (weights @ misses))


def _wins(given: Forecasts) -> DoubleArray:  # [P, P]
    """Pairs in the right order, by the prompt of the accepted one and that of the other.

    Any draw of prompts holds each pair of its prompts' forecasts as often as the weights' product
    says, so this is all that the draws need to know of M forecasts.
    """
    hit = given.outcome == 1
    order = np.argsort(given.predicted[hit])  # look-ups that rise are many times faster
    scores, owners = given.predicted[hit][order], given.prompt[hit][order]
    wins = np.zeros((given.prompts, given.prompts))
    for prompt in np.unique(given.prompt[~hit]):
        others = np.sort(given.predicted[~hit & (given.prompt == prompt)])
        below = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
        wins[:, prompt] = np.bincount(owners, below / 2, minlength=given.prompts)
    return wins


def _binned(
    given: Forecasts,
    place: IntArray,  # [M] bin of each forecast
    weights: DoubleArray,  # [1+B, P]
) -> tuple[DoubleArray, DoubleArray, DoubleArray]:  # [1+B, E] each
    """Forecasts a bin, and the sums of what they promise and of what came."""
    cell, shape = given.prompt * BINS + place, (given.prompts, BINS)
    counts, predicted, observed = (
        totals(weights, np.bincount(cell, values, minlength=given.prompts * BINS).reshape(shape))
        for values in (np.ones(len(cell)), given.predicted, given.outcome)
    )
    return counts, predicted, observed
