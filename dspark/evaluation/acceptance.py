"""How much of what is drafted the target accepts (paper §4.2, Figures 2 and 5).

    τ                accepted length: tokens a round, the target's own included (Table 1)
    conditional      P(x_k accepted | x_<k accepted), by position (Figure 2)
    survival         P(x_≤k accepted): the product of the conditionals up to k
    threshold sweep  what is left of blocks that are cut before the first draft token whose
                     confidence is below a threshold (Figure 5)

Conditionals and survival allow for blocks that were verified in part: position k counts where it
was put to the test. The sweep is made offline: what rounds after a cut would have been is not told.

Statistics are arrays [1+B, …], as dspark.evaluation.bootstrap has them. Shape symbols: B draws,
P prompts, N rounds, γ block size, T thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.evaluation.bootstrap import ratio, totals
from dspark.evaluation.rounds import Rounds
from dspark.types import DoubleArray, IntArray

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def accepted_length(rounds: Rounds, weights: DoubleArray) -> DoubleArray:  # [1+B, P] -> [1+B]
    """τ, the target's own token of each round included."""
    return _a_round(rounds, rounds.tokens, weights)


def accepted_drafts(rounds: Rounds, weights: DoubleArray) -> DoubleArray:  # [1+B, P] -> [1+B]
    """Accepted draft tokens a round: τ without the target's own."""
    return _a_round(rounds, rounds.accepted, weights)


def times_tested(rounds: Rounds) -> IntArray:  # [γ]
    """By position, rounds in which it was verified and all before it were accepted."""
    return np.asarray(_tested(rounds).sum(axis=0))


def conditional_acceptance(
    rounds: Rounds,
    weights: DoubleArray,  # [1+B, P]
) -> DoubleArray:  # [1+B, γ]
    """By position, the share accepted of those put to the test."""
    accepted = totals(weights, rounds.by_prompt(rounds.stood))
    return ratio(accepted, totals(weights, rounds.by_prompt(_tested(rounds))))


def prefix_survival(conditional: DoubleArray) -> DoubleArray:  # [1+B, γ] -> [1+B, γ]
    """By position, the chance that it and all before it are accepted."""
    return np.asarray(np.cumprod(conditional, axis=1))


@dataclass(frozen=True, slots=True)
class Sweep:
    """By threshold: draft tokens and tokens a round, and shares of draft tokens."""

    kept: DoubleArray  # [1+B, T] draft tokens a round that are verified
    accepted: DoubleArray  # [1+B, T] of those, accepted a round
    acceptance: DoubleArray  # [1+B, T] accepted / kept
    share_kept: DoubleArray  # [1+B, T] of what is verified without a threshold
    accepted_length: DoubleArray  # [1+B, T] tokens a round, the target's own included
    n: IntArray  # [T] draft tokens kept


def threshold_sweep(
    rounds: Rounds,
    weights: DoubleArray,  # [1+B, P]
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> Sweep:
    """Cut every block before the first draft token with a confidence below the threshold."""
    kept = np.stack([_lengths_above(rounds, threshold) for threshold in thresholds], axis=1)
    accepted = np.minimum(rounds.accepted[:, None], kept)
    # A block that is cut before its end leaves the answer open, so a token of the target's follows.
    own = np.where(kept < rounds.accepted[:, None], 1, (rounds.tokens - rounds.accepted)[:, None])
    kept_sum, accepted_sum, own_sum, whole, count = (
        totals(weights, rounds.by_prompt(values))
        for values in (
            kept,
            accepted,
            own,
            np.broadcast_to(rounds.verified[:, None], kept.shape),
            np.ones_like(kept),
        )
    )
    return Sweep(
        kept=ratio(kept_sum, count),
        accepted=ratio(accepted_sum, count),
        acceptance=ratio(accepted_sum, kept_sum),
        share_kept=ratio(kept_sum, whole),
        accepted_length=ratio(accepted_sum + own_sum, count),
        n=kept.sum(axis=0),
    )


def _a_round(rounds: Rounds, values: IntArray, weights: DoubleArray) -> DoubleArray:
    pairs = totals(weights, rounds.by_prompt(np.stack([values, np.ones_like(values)], axis=1)))
    return ratio(pairs[:, 0], pairs[:, 1])


def _tested(rounds: Rounds) -> npt.NDArray[np.bool_]:  # [N, γ]
    return rounds.judged & (np.arange(rounds.width) <= rounds.accepted[:, None])


def _lengths_above(rounds: Rounds, threshold: float) -> IntArray:  # [N]
    # comparisons with NaN are false, so what was not verified ends a block as well
    above = rounds.confidences >= threshold
    return np.asarray(np.logical_and.accumulate(above, axis=1).sum(axis=1))
