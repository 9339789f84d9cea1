"""Retry times: bounded, longer for more who wait, and for slower finishes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.pace import LEAST_WAIT_S, MOST_WAIT_S, Pace, bounded_wait_s


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(gaps: list[float], open_gap: float = 0.0) -> Pace:
    clock = Clock()
    pace = Pace(clock)
    for gap in gaps:
        clock.now += gap
        pace.finished()
    clock.now += open_gap
    return pace


GAPS = st.lists(st.floats(0.0, 100.0), max_size=80)


@given(GAPS, st.integers(0, 1000), st.integers(0, 1000))
def test_waits_are_bounded_and_grow_with_the_queue(gaps: list[float], one: int, two: int) -> None:
    pace = paced(gaps)
    few, many = sorted((one, two))
    assert LEAST_WAIT_S <= pace.wait_s(few) <= pace.wait_s(many) <= MOST_WAIT_S


@given(GAPS, st.floats(0.0, 1000.0), st.floats(0.0, 1000.0))
def test_a_wait_grows_while_nothing_finishes(gaps: list[float], one: float, two: float) -> None:
    soon, late = sorted((one, two))
    assert paced(gaps, soon).wait_s(7) <= paced(gaps, late).wait_s(7) + 1e-9


def test_the_wait_is_the_queue_over_the_recent_rate() -> None:
    assert paced([]).wait_s(50) == LEAST_WAIT_S  # nothing is known
    assert paced([0.5] * 10).wait_s(20) == pytest.approx(10.0)
    assert paced([9.0] * 40 + [0.5] * 32).wait_s(20) == pytest.approx(10.0)  # the old are forgotten
    assert paced([0.5] * 3, open_gap=2.5).wait_s(20) == pytest.approx(20.0)


def test_rests_do_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(4):
        clock.now += 3600.0
        pace.resume()
        clock.now += 2.0
        pace.finished()
    assert pace.wait_s(3) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("told", "wait_s"), [(math.nan, 1.0), (-math.inf, 1.0), (math.inf, 60.0), (7.5, 7.5)]
)
def test_what_a_peer_says_is_bounded(told: float, wait_s: float) -> None:
    assert bounded_wait_s(told) == wait_s
