"""Intervals hold what they should as often as they should, and are not given where they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.evaluation.bootstrap import DRAWS, estimate, estimates, prompt_weights, ratio, totals


@pytest.mark.statistical
def test_the_interval_covers_the_truth() -> None:
    """300 samples of 60 prompts whose rates differ, rounds of a prompt alike.

    Percentile intervals of so many prompts cover about 93.5 %. Fewer than 89 % of 300 would come
    about with a chance below 2e-3 if they do, and above 0.995 if rounds instead of prompts were
    drawn (which covers some 56 % here).
    """
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(300):
        rates = rng.beta(2, 2, size=60)
        counts = rng.integers(5, 40, size=60)
        hits = rng.binomial(counts, rates)
        drawn = totals(prompt_weights(60, seed), np.stack([hits, counts], axis=1))
        got = estimate(ratio(drawn[:, 0], drawn[:, 1]), int(counts.sum()))
        assert got.low is not None
        assert got.high is not None
        covered += got.low <= 0.5 <= got.high
    assert covered >= 0.89 * 300


def test_weights_draw_as_many_prompts_as_there_are() -> None:
    weights = prompt_weights(9)
    assert weights.shape == (1 + DRAWS, 9)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 9).all()
    assert (prompt_weights(9) == weights).all()


def test_one_prompt_gives_a_value_and_no_interval() -> None:
    got = estimate(totals(prompt_weights(1), np.array([4.0])), 12)
    assert (got.value, got.low, got.high, got.n) == (4.0, None, None, 12)


def test_what_most_draws_cannot_tell_has_no_interval() -> None:
    sums = np.zeros((10, 2))
    sums[0] = (3.0, 4.0)  # one prompt alone has any case: a third of the draws miss it
    drawn = totals(prompt_weights(10), sums)
    (got,) = estimates(ratio(drawn[:, :1], drawn[:, 1:]), np.array([4]))
    assert (got.value, got.low, got.high) == (0.75, None, None)
    nothing = estimate(np.full(1 + DRAWS, np.nan), 0)
    assert (nothing.value, nothing.low, nothing.n) == (None, None, 0)
