"""Whose blocks are asked for, how long, and when one that was left out is looked at again."""

from __future__ import annotations

import numpy as np
from helpers.tables import flat_table
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.draft_policy import DraftPolicy, Prospect
from dspark.scheduling.round_times import RoundTimes
from dspark.types import FloatArray

GAMMA = 5
GOOD = np.array([0.95, 0.9, 0.85, 0.8, 0.75], dtype=np.float32)
BAD = np.array([0.1, 0.02, 0.01, 0.0, 0.0], dtype=np.float32)


def times(block_ms: float, row_ms: float = 1.0, requests: int = 8) -> RoundTimes:
    """Rounds of 10 ms and a bit for each row and each block, as they were measured."""
    table = flat_table(
        (1, 64), (1, 8), tuple((10.0 + r * row_ms, 10.0 + 8 * r * row_ms) for r in (1, 64))
    )
    known = RoundTimes(table)
    for count in {requests, requests // 2} - {0}:
        for drafted in (0, GAMMA) * 3:
            for _ in range(5):
                tokens = count * (1 + drafted)
                step_ms = table.at(1).ms(count, tokens)
                known.record(
                    requests=count,
                    tokens=tokens,
                    drafted=drafted,
                    step_ms=step_ms,
                    round_ms=step_ms + (block_ms * count if drafted else 0.0),
                )
    return known


def after(blocks: FloatArray, count: int = 10) -> Prospect:
    prospect = Prospect()
    for _ in range(count):
        prospect.see(blocks)
    return prospect


def test_those_whose_blocks_pay_are_drafted_for_and_others_are_not() -> None:
    prospects = [after(GOOD), after(BAD), after(GOOD), after(BAD)]
    sizes = DraftPolicy(times(1.0)).sizes(prospects, GAMMA)
    assert [size > 0 for size in sizes] == [True, False, True, False]
    assert [p.left_out for p in prospects] == [False, True, False, True]


def test_blocks_are_cut_behind_what_may_pay() -> None:
    falling = np.array([0.9, 0.7, 0.05, 0.01, 0.0], dtype=np.float32)
    assert DraftPolicy(times(0.5)).sizes([after(falling), after(GOOD)], GAMMA) == [3, GAMMA]


def test_a_position_that_is_sometimes_good_is_drafted() -> None:
    """What is unlikely is not verified: a block is worth its better cases, not its mean."""
    mixed = Prospect()
    for good in (True, False, False, False):
        mixed.see(GOOD if good else BAD)
    assert DraftPolicy(times(0.1)).sizes([mixed, after(GOOD)], GAMMA) == [GAMMA, GAMMA]


def test_what_costs_nothing_is_drafted_for_all() -> None:
    policy = DraftPolicy(times(0.0, row_ms=1e-6))
    assert policy.sizes([after(GOOD), after(BAD)], GAMMA) == [GAMMA, 4]


def test_one_that_is_not_known_yet_is_drafted_for() -> None:
    assert DraftPolicy(times(50.0)).sizes([Prospect()], GAMMA) == [GAMMA]


def test_looks_at_those_left_out_become_rarer() -> None:
    policy, prospect = DraftPolicy(times(2.0)), after(BAD)
    asked = [bool(policy.sizes([prospect, after(GOOD)], GAMMA)[0]) for _ in range(600)]
    at = [i for i, yes in enumerate(asked) if yes]
    gaps = np.diff(at)
    assert 3 <= len(at) <= 8
    assert (np.diff(gaps) > 0).all()


def test_a_request_that_became_predictable_is_drafted_for_again() -> None:
    """Two looks at good blocks are enough."""
    policy, prospect = DraftPolicy(times(2.0)), after(BAD, 50)
    rounds = looks = 0
    while looks < 3:
        rounds += 1
        if policy.sizes([prospect, after(GOOD)], GAMMA)[0]:
            prospect.see(GOOD)
            looks += 1
    assert rounds <= 40
    assert all(policy.sizes([prospect, after(GOOD)], GAMMA)[0] for _ in range(10))


def test_one_whose_confidences_promise_too_much_is_left_out() -> None:
    prospect = after(GOOD)
    for _ in range(40):
        prospect.settle(4.0, 0)
    assert DraftPolicy(times(1.0)).sizes([prospect, after(GOOD)], GAMMA) == [0, GAMMA]


def test_few_blocks_go_where_they_bring_most() -> None:
    middling = np.array([0.8, 0.6, 0.5, 0.4, 0.3], dtype=np.float32)
    prospects = [after(middling), after(GOOD), after(middling), after(GOOD)]
    known = times(0.1)
    assert all(DraftPolicy(known).sizes(prospects, GAMMA))
    few = DraftPolicy(known).sizes(prospects, GAMMA, most_blocks=2)
    assert [s > 0 for s in few] == [0, 1, 0, 1]
    heavy = np.array([10.0, 1.0, 1.0, 1.0])
    few = DraftPolicy(known).sizes(prospects, GAMMA, weights=heavy, most_blocks=1)
    assert [s > 0 for s in few] == [1, 0, 0, 0]


some_blocks = st.lists(
    st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=GAMMA).map(
        lambda row: np.cumprod(np.array(row, dtype=np.float32))
    ),
    max_size=6,
)


@given(
    st.lists(some_blocks, min_size=1, max_size=6),
    st.floats(0.0, 20.0),
    st.integers(0, 4),
    st.integers(1, GAMMA),
)
def test_never_longer_than_asked_nor_more_than_there_are(
    histories: list[list[FloatArray]], block_ms: float, most: int, size: int
) -> None:
    prospects = []
    for history in histories:
        prospects.append(Prospect())
        for block in history:
            prospects[-1].see(block)
    sizes = DraftPolicy(times(block_ms)).sizes(prospects, size, most_blocks=most)
    assert all(0 <= n <= size for n in sizes)
    assert not most or sum(n > 0 for n in sizes) <= most
