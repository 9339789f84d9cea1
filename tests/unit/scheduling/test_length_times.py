"""Lengths of blocks are compared where they meet, whatever the host's speed was elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.length_times import LengthTimes

MS = {1: 3.0, 3: 4.0, 7: 6.0}  # that rounds with such blocks take


def run(times: LengthTimes, lengths: list[int], begin: int = 0, more_ms: float = 0.0) -> int:
    for at, length in enumerate(lengths, begin):
        times.add(at, length, MS[length] + more_ms)
    return begin + len(lengths)


def test_a_length_does_not_win_by_the_moment_that_it_had() -> None:
    """The long block was timed while the host was slow, and is not asked for now that it is not."""
    times = LengthTimes()
    at = run(times, [7] * 10 + [3] * 4 + [7] * 10, more_ms=4.0)
    assert times.usual_ms(7, 0.0) == pytest.approx(10.0)
    run(times, [3] * 20, at + 100)
    assert times.usual_ms(3, 0.0) == pytest.approx(4.0)
    assert times.usual_ms(7, 0.0) == pytest.approx(6.0)


@given(
    usual=st.sampled_from(sorted(MS)),
    more_ms=st.lists(st.floats(0.0, 20.0), min_size=30, max_size=30),
)
def test_differences_hold_however_the_speed_moves_between_meetings(
    usual: int, more_ms: list[float]
) -> None:
    times, at = LengthTimes(), 0
    for i, more in enumerate(more_ms):
        other = sorted(MS)[i % len(MS)]
        at = run(times, [usual] * 6 + [other], at, more) + 64
    found = {length: times.usual_ms(length, 0.0) for length in MS}
    for length, ms in found.items():
        assert ms is not None
        assert ms - found[usual] == pytest.approx(MS[length] - MS[usual])


def test_one_disturbed_round_changes_nothing() -> None:
    times = LengthTimes()
    at = run(times, [7, 7, 7, 7, 3, 7, 7, 7] * 12)
    times.add(at, 7, 500.0)
    times.add(at + 1, 3, 500.0)
    for length in (3, 7):
        assert times.usual_ms(length, 0.0) == pytest.approx(MS[length])


def test_what_has_never_met_another_length_is_taken_as_it_was() -> None:
    times = LengthTimes()
    run(times, [7] * 5)
    run(times, [3] * 5, 1000)
    assert times.usual_ms(3, 0.0) == pytest.approx(4.0)
    assert times.usual_ms(7, 0.0) == pytest.approx(6.0)


def test_nothing_is_known_of_few_rounds() -> None:
    times = LengthTimes()
    assert times.usual_ms(7, 1.0) is None
    run(times, [7, 7])
    assert not times.known
    assert times.usual_ms(7, 1.0) is None
    run(times, [7], 2)
    assert times.known
    assert times.knows(7)
    assert not times.knows(3)


def test_lengths_between_lie_on_the_line_and_half_of_drafting_is_never_saved() -> None:
    times = LengthTimes()
    run(times, [7] * 4 + [3] * 4)
    assert times.usual_ms(5, 0.0) == pytest.approx(5.0)
    assert times.usual_ms(9, 0.0) == pytest.approx(6.0)
    nothing = 1.0 + 0.5 * (4.0 - 1.0)
    assert times.usual_ms(1, 1.0) == pytest.approx(float(np.interp(1, [0, 3], [nothing, 4.0])))


def test_no_length_takes_longer_than_a_longer_one() -> None:
    times = LengthTimes()
    for at, length in enumerate([7] * 6 + [3] * 6):
        times.add(at, length, 9.0 if length == 3 else 6.0)
    known = times.usual_ms(7, 0.0)
    assert times.usual_ms(3, 0.0) == known
