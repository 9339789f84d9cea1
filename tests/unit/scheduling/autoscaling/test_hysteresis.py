"""A count changes for what lasts, and is as near to the need as the deadband."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.autoscaling.hysteresis import Hysteresis

SLOW = Hysteresis(up_after_s=10.0, down_after_s=300.0, deadband=0.1)
COUNTS = st.integers(0, 50)
NEEDS = st.floats(0.0, 100.0)


def play(rule: Hysteresis, current: int, needs: Sequence[float], every_s: float = 1.0) -> list[int]:
    """Counts over time; the state goes through JSON, as it may."""
    counts, state = [], {}
    for tick, needed in enumerate(needs):
        wanted = rule.recommend(current, needed)
        current, state = rule.settle(tick * every_s, current, wanted, state, may_shrink=True)
        state = json.loads(json.dumps(state))
        counts.append(current)
    return counts


@given(COUNTS, NEEDS, NEEDS)
def test_more_need_never_recommends_less(current: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert SLOW.recommend(current, low) <= SLOW.recommend(current, high)


@given(COUNTS, NEEDS)
def test_a_recommendation_is_enough_but_for_the_deadband(current: int, needed: float) -> None:
    recommended = SLOW.recommend(current, needed)
    assert recommended * 1.1 >= needed - 1e-9
    if recommended < current:
        assert recommended >= needed


def test_up_comes_soon_and_down_late() -> None:
    assert play(SLOW, 1, [3.0] * 12) == [1] * 10 + [3, 3]
    assert play(SLOW, 3, [1.0] * 302) == [3] * 300 + [2, 2]  # 1.1, with the deadband


def test_the_least_that_was_needed_comes_and_the_most_stays() -> None:
    assert play(SLOW, 1, [5.0, 2.0, *[5.0] * 9])[-1] == 2
    assert play(SLOW, 5, [0.5, 2.5, *[0.5] * 299])[-1] == 3


def test_a_need_that_is_met_again_starts_the_delay_anew() -> None:
    assert play(SLOW, 1, [3.0] * 10 + [1.0] + [3.0] * 10) == [1] * 21


@given(st.lists(NEEDS, max_size=400), COUNTS)
def test_changes_keep_their_distance(needs: list[float], current: int) -> None:
    rule = Hysteresis(up_after_s=10.0, down_after_s=50.0, deadband=0.1)
    counts = [current, *play(rule, current, needs)]
    changes = [t for t in range(1, len(counts)) if counts[t] != counts[t - 1]]
    for before, at in zip([0, *changes], changes, strict=False):
        grows = counts[at] > counts[at - 1]
        assert at - before >= (10 if grows else 50)


def test_without_leave_to_shrink_nothing_goes() -> None:
    state: dict[str, object] = {}
    for now in range(1000):
        count, state = SLOW.settle(float(now), 4, 1, state, may_shrink=False)
        assert count == 4


def test_a_clock_that_is_set_back_delays_by_no_more_than_the_delay() -> None:
    _, state = SLOW.settle(5000.0, 1, 2, {}, may_shrink=True)
    _, state = SLOW.settle(1000.0, 1, 2, state, may_shrink=True)
    assert SLOW.settle(1010.0, 1, 2, state, may_shrink=True)[0] == 2
