"""What the fault drill makes of the times at which tokens came."""

from __future__ import annotations

import math

import pytest
from helpers.fault_load import Timeline


def every(gap_s: float, since: float, until: float) -> list[tuple[float, int]]:
    return [(since + i * gap_s, 1) for i in range(round((until - since) / gap_s))]


STEADY = every(0.1, 0.0, 30.0)
STALLED = [*every(0.1, 0.0, 10.0), *every(0.1, 14.0, 30.0)]


def test_the_rate_is_of_all_clients() -> None:
    assert Timeline([STEADY, STALLED]).rate(0.0, 10.0) == pytest.approx(20.0)
    assert Timeline([STEADY, STALLED]).rate(11.0, 13.0) == pytest.approx(10.0)


def test_the_longest_wait_is_of_one_client() -> None:
    timeline = Timeline([STEADY, STALLED])
    assert timeline.longest_wait_s(10.0, 20.0) == pytest.approx(4.0)
    assert timeline.longest_wait_s(10.0, 13.0) == pytest.approx(3.0)  # it goes on
    assert timeline.longest_wait_s(15.0, 20.0) == pytest.approx(0.1)


def test_clients_are_back_when_a_window_after_the_slowest_has_its_tokens() -> None:
    timeline = Timeline([STEADY, STALLED])
    assert timeline.slowest(10.0, 20.0)[1] == pytest.approx(10.0)
    assert timeline.back_after_s(10.0, 20.0, level=20.0) == pytest.approx(3.6, abs=0.11)
    assert timeline.back_after_s(10.0, 20.0, level=11.0) == 0.0  # it never fell that far
    assert timeline.back_after_s(10.0, 20.0, level=40.0) == math.inf
