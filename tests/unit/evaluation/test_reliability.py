"""Calibration measures agree with their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.evaluation.bootstrap import prompt_weights
from dspark.evaluation.reliability import (
    Forecasts,
    auc,
    brier_score,
    calibration_error,
    reliability_diagram,
)
from dspark.scheduling.calibration import BINS, expected_calibration_error

# few different values, so that there are ties
CASES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 8).map(lambda i: i / 8), st.integers(0, 1)),
    min_size=1,
    max_size=40,
)
Cases = list[tuple[int, float, int]]


def forecast(cases: Cases) -> Forecasts:
    prompt, predicted, outcome = (np.array(column) for column in zip(*cases, strict=True))
    return Forecasts(4, prompt, predicted.astype(np.float64), outcome)


def drawn(cases: Cases, weights: np.ndarray) -> Cases:  # [P]
    return [case for case in cases for _ in range(int(weights[case[0]]))]


@given(CASES)
def test_auc_is_the_share_of_pairs_in_the_right_order(cases: Cases) -> None:
    weights = prompt_weights(4, seed=5)[:5]
    got = auc(forecast(cases), weights)
    for row, value in zip(weights, got, strict=True):
        sample = drawn(cases, row)
        pairs = [
            (a > b) + (a == b) / 2
            for _, a, hit in sample
            if hit
            for _, b, miss in sample
            if not miss
        ]
        assert value == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


@given(CASES)
def test_diagram_and_brier_score_are_means(cases: Cases) -> None:
    weights = prompt_weights(4, seed=6)[:5]
    of = forecast(cases)
    diagram, brier = reliability_diagram(of, weights), brier_score(of, weights)
    for i, row in enumerate(weights):
        sample = drawn(cases, row)
        squares = [(p - y) ** 2 for _, p, y in sample]
        assert brier[i] == pytest.approx(np.mean(squares) if squares else np.nan, nan_ok=True)
        for e in range(BINS):
            own = [(p, y) for _, p, y in sample if min(int(p * BINS), BINS - 1) == e]
            expected = np.mean(own, axis=0) if own else (np.nan, np.nan)
            got = (diagram.predicted[i, e], diagram.observed[i, e])
            assert got == pytest.approx(expected, nan_ok=True)
            if sample:
                assert diagram.share[i, e] == pytest.approx(len(own) / len(sample))


@given(CASES)
def test_the_calibration_error_is_the_one_that_sts_minimises(cases: Cases) -> None:
    of = forecast(cases)
    expected = expected_calibration_error(of.predicted, of.outcome == 1)
    assert calibration_error(of, prompt_weights(4))[0] == pytest.approx(expected)


@pytest.mark.statistical
def test_true_chances_are_calibrated_and_distorted_ones_are_not() -> None:
    """20,000 cases: the ECE of true chances is 0.007 ± 0.002, so 0.02 is seven deviations off."""
    rng = np.random.default_rng(11)
    chances = rng.uniform(size=20_000)
    prompt, outcome = rng.integers(0, 4, 20_000), (rng.uniform(size=20_000) < chances).astype(int)
    once = np.ones((1, 4))
    true = Forecasts(4, prompt, chances, outcome)
    distorted = Forecasts(4, prompt, np.sqrt(chances), outcome)
    assert calibration_error(true, once)[0] < 0.02
    assert calibration_error(distorted, once)[0] > 0.1
    assert auc(true, once)[0] == pytest.approx(auc(distorted, once)[0])  # the order is the same
