"""Θ measured against Θ predicted: ratios, a step that hung, and an alarm that does not flutter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.throughput import PredictedThroughput

THRESHOLD = 0.25


def after(steps: Sequence[float], slower: float = 1.0) -> PredictedThroughput:
    """Having seen steps that took 10 ms times so much, and committed as predicted."""
    one = PredictedThroughput(THRESHOLD)
    for stretch in steps:
        one.take(4.0, 10.0, 4, 10.0 * stretch * slower)
    return one


def test_before_any_step_all_is_as_predicted() -> None:
    one = PredictedThroughput(THRESHOLD)
    assert (one.ratio, one.token_ratio, one.time_ratio, one.alarm) == (1.0, 1.0, 1.0, False)
    assert one.predicted_per_s == one.measured_per_s == 0.0


@given(st.floats(0.5, 50.0), st.floats(0.01, 100.0), st.floats(0.3, 3.0), st.integers(1, 500))
def test_steps_all_alike_give_their_own_ratio(
    tokens: float, ms: float, stretch: float, steps: int
) -> None:
    one = PredictedThroughput(THRESHOLD)
    for _ in range(steps):
        one.take(tokens, ms, 3, ms * stretch)
    assert one.time_ratio == pytest.approx(stretch)
    assert one.token_ratio == pytest.approx(3 / tokens)
    assert one.ratio == pytest.approx(one.measured_per_s / one.predicted_per_s)
    assert one.predicted_per_s == pytest.approx(1e3 * tokens / ms)
    assert one.steps == steps


def test_tokens_come_whole_and_are_judged_by_their_mean() -> None:
    one = PredictedThroughput(THRESHOLD)
    for step in range(2000):
        one.take(2.5, 10.0, 5 if step % 2 else 0, 10.0)
        assert not one.alarm
    assert one.ratio == pytest.approx(1.0, abs=0.01)


def test_one_step_that_hangs_is_no_alarm() -> None:
    one = after([1.0] * 300)
    assert not one.take(4.0, 10.0, 4, 60_000.0)
    assert one.ratio > 0.95


@pytest.mark.parametrize("stretch", [1.5, 0.6, 100.0, 0.001])
def test_an_alarm_is_raised_once_and_ends_well_below_its_threshold(stretch: float) -> None:
    one = after([1.0] * 300)
    raised = [one.take(4.0, 10.0, 4, 10.0 * stretch) for _ in range(2000)]
    assert raised.count(True) == 1
    assert one.alarm
    while one.alarm:
        before = abs(math.log(one.ratio))
        changed = one.take(4.0, 10.0, 4, 10.0)
        assert changed != one.alarm
        assert one.alarm or THRESHOLD / 3 < before < THRESHOLD
    assert not any(one.take(4.0, 10.0, 4, 10.0) for _ in range(2000))


def test_a_ratio_about_the_threshold_does_not_flutter() -> None:
    edge = math.exp(THRESHOLD)
    one = after([edge * 1.05] * 600)
    assert one.alarm
    turns = [one.take(4.0, 10.0, 4, 10.0 * edge * (0.9, 1.1)[i // 300 % 2]) for i in range(6000)]
    assert not any(turns)


def test_a_start_is_too_few_steps_to_tell() -> None:
    assert not after([3.0] * 20).alarm


def test_nothing_committed_at_all_is_an_alarm() -> None:
    one = PredictedThroughput(THRESHOLD)
    assert any(one.take(2.0, 10.0, 0, 10.0) for _ in range(100))


def test_no_threshold_no_alarm() -> None:
    one = PredictedThroughput(0.0)
    assert not any(one.take(2.0, 10.0, 0, 1000.0) for _ in range(500))
