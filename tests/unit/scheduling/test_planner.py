"""What the planner admits, and why it stops where it stops."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.decoding.acceptance import Drafts
from dspark.decoding.noise import Stream, draw_key, key_tensor, uniform
from dspark.scheduling import planner
from dspark.scheduling import survival as survival_module
from dspark.scheduling.planner import RoundsMs, Search, plan_lengths, reserve
from dspark.scheduling.survival import ABSENT, survival, survival_table
from dspark.types import DoubleArray, FloatArray, Scale, Scales
from tests.helpers.tables import by_count
from tests.helpers.verdicts import verify_rejection

# Few values, so that ties are common.
some_confidences = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0.0, 1.0), max_size=6),
    min_size=1,
    max_size=6,
)
some_weights = st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=6, max_size=6)
searches: st.SearchStrategy[Search] = st.sampled_from(["causal", "ranked", "global"])


def survivals(rows: list[list[float]]) -> FloatArray:
    return survival_table([np.array(row, dtype=np.float32) for row in rows])


def linear(slope: float, start: float = 10.0) -> RoundsMs:
    return by_count(lambda tokens: start + slope * tokens)


def sizes_of(a: FloatArray) -> list[int]:
    return [int(n) for n in (a > ABSENT).sum(axis=1)]


def worth_of(a: FloatArray, lengths: list[int] | tuple[int, ...], weights: DoubleArray) -> float:
    kept = np.arange(a.shape[1]) < np.array(lengths)[:, None]
    return float((weights * (1.0 + np.where(kept, a, 0.0).sum(axis=1))).sum())


def test_a_table_of_survivals_is_each_block_by_itself() -> None:
    blocks = [np.array(x, dtype=np.float32) for x in ([0.9, 0.5], [], [0.3])]
    scales = Scales(Scale((2.0, 0.5), (0.0, 1.0)), Scale((3.0,), (-1.0,)))
    for more in (0, 40):  # few draft tokens and many, of one length and of several
        given = blocks + [np.array([0.7, 0.6], dtype=np.float32)] * more
        for some in (given, given[3:]):
            kinds = [i % 3 == 0 for i in range(len(some))]
            table = survival_table(some, kinds, scales) if some else []
            for row, block, greedy in zip(table, some, kinds, strict=True):
                scale = scales.greedy if greedy else scales.sampled
                assert row[: len(block)] == pytest.approx(survival(block, scale))
                assert (row[len(block) :] == ABSENT).all()
    assert survival_table([np.zeros(0, dtype=np.float32)]).shape == (1, 0)


@given(some_confidences, some_weights, st.floats(0.0, 5.0), st.none() | st.integers(0, 8), searches)
def test_it_admits_what_is_worth_most_up_to_the_ceiling(
    rows: list[list[float]],
    of_requests: list[float],
    slope: float,
    ceiling: int | None,
    search: Search,
) -> None:
    a, weights = survivals(rows), np.array(of_requests[: len(rows)])
    found = plan_lengths(a, linear(slope), ceiling=ceiling, search=search, weights=weights)
    sizes = sizes_of(a)
    assert all(0 <= n <= size for n, size in zip(found.lengths, sizes, strict=True))
    if ceiling is not None:
        assert sum(found.lengths) <= ceiling
    if search == "ranked":
        assert sum(found.lengths) == min(sum(sizes), sum(sizes) if ceiling is None else ceiling)
    admitted = [w * x for n, w, row in zip(found.lengths, weights, a, strict=True) for x in row[:n]]
    refused = [
        w * x
        for n, size, w, row in zip(found.lengths, sizes, weights, a, strict=True)
        for x in row[n:size]
    ]
    if admitted and refused:
        assert min(admitted) >= max(refused)
    assert found.expected == pytest.approx(worth_of(a, found.lengths, np.ones(len(rows))), rel=1e-5)
    assert found.round_ms == pytest.approx(10.0 + slope * (len(rows) + sum(found.lengths)))


@given(
    some_confidences,
    some_weights,
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.floats(0.0, 5.0),
    st.none() | st.integers(0, 30),
    searches,
)
def test_few_tokens_are_planned_like_many(
    rows: list[list[float]],
    of_requests: list[float],
    held: list[int],
    slope: float,
    ceiling: int | None,
    search: Search,
) -> None:
    """Up to some number there is another way through; it comes to the same."""
    ways = []
    for few in (0, 10_000):
        with (
            mock.patch.object(planner, "_FEW", few),
            mock.patch.object(survival_module, "_FEW", few),
        ):
            a, weights = survivals(rows), np.array(of_requests[: len(rows)])
            most = np.minimum(np.array(held[: len(rows)]), (a > ABSENT).sum(axis=1))
            reserved = most if ceiling is None or most.sum() <= ceiling else None
            found = plan_lengths(
                a,
                linear(slope),
                ceiling=ceiling,
                search=search,
                weights=weights,
                reserved=reserved,
            )
            ways.append((a, found))
    (table, one), (other_table, other) = ways
    assert table == pytest.approx(other_table, rel=1e-6)
    assert one.promised == pytest.approx(other.promised, rel=1e-5)
    assert one.lengths == other.lengths or one.throughput == pytest.approx(other.throughput)


@given(some_confidences, some_weights, st.floats(0.0, 5.0), st.none() | st.integers(0, 8), searches)
def test_equal_inputs_give_equal_plans(
    rows: list[list[float]],
    of_requests: list[float],
    slope: float,
    ceiling: int | None,
    search: Search,
) -> None:
    a, weights = survivals(rows), np.array(of_requests[: len(rows)])
    plans = [
        plan_lengths(
            a.copy(), linear(slope), ceiling=ceiling, search=search, weights=weights.copy()
        )
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


@given(some_confidences, st.floats(0.0, 5.0))
def test_what_it_admits_never_lowers_expected_throughput(
    rows: list[list[float]], slope: float
) -> None:
    a = survivals(rows)
    found = plan_lengths(a, linear(slope))
    nothing = plan_lengths(a, linear(slope), ceiling=0)
    assert nothing.lengths == [0] * len(rows)
    assert found.throughput >= nothing.throughput - 1e-6


@given(some_confidences, st.integers(0, 12), st.integers(0, 5), st.floats(1.0, 4.0))
def test_what_is_likelier_is_never_ranked_lower(
    rows: list[list[float]], ceiling: int, which: int, by: float
) -> None:
    """With a given capacity. Algorithm 1's own bar rises with Θ, and so with any survival."""
    a = survivals(rows)
    which %= len(rows)
    likelier = a.copy()
    row = likelier[which]
    row[row > ABSENT] = np.minimum(row[row > ABSENT] * np.float32(by), 1.0)
    before = plan_lengths(a, linear(1.0), ceiling=ceiling, search="ranked")
    after = plan_lengths(likelier, linear(1.0), ceiling=ceiling, search="ranked")
    assert after.lengths[which] >= before.lengths[which]


@by_count
def flat(tokens: DoubleArray) -> DoubleArray:
    return np.full(len(tokens), 10.0)


def test_free_tokens_are_all_admitted_and_dear_ones_are_not() -> None:
    a = survivals([[0.9, 0.5], [0.3]])
    assert plan_lengths(a, flat).lengths == [2, 1]
    assert plan_lengths(a, linear(10.0, 0.0)).lengths == [0, 0]
    assert plan_lengths(survivals([[], []]), flat).lengths == [0, 0]


def test_ties_go_by_position_then_by_request() -> None:
    a = survivals([[0.5, 1.0], [0.5, 1.0], [0.5, 1.0]])
    by_count = [plan_lengths(a, flat, ceiling=n, search="ranked").lengths for n in range(7)]
    assert by_count == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
        [2, 2, 1],
        [2, 2, 2],
    ]


def test_prompt_tokens_in_the_step_are_paid_for() -> None:
    @by_count
    def knee(tokens: DoubleArray) -> DoubleArray:
        return np.where(tokens <= 8, 10.0, 10.0 * tokens)

    a = survivals([[0.9, 0.9, 0.9]])
    assert plan_lengths(a, knee).lengths == [3]
    assert plan_lengths(a, knee, extra_tokens=6).lengths == [1]


def test_calibration_flattens_survival() -> None:
    raw = np.array([0.9, 0.9], dtype=np.float32)
    assert survival(raw, Scale((2.0, 2.0)))[1] < survival(raw)[1]
    assert survival(raw, Scale((2.0,)))[0] == pytest.approx(0.75, abs=1e-6)
    assert survival(raw, Scale((), (-math.log(9.0),)))[0] == pytest.approx(0.5, abs=1e-6)


@given(
    some_confidences,
    st.lists(st.floats(0.0, 4.0), min_size=6, max_size=6),
    some_weights,
    st.none() | st.integers(0, 12),
    st.floats(0.0, 5.0),
    searches,
)
def test_floors_come_first(
    rows: list[list[float]],
    wanted: list[float],
    of_requests: list[float],
    ceiling: int | None,
    slope: float,
    search: Search,
) -> None:
    a, floors = survivals(rows), np.array(wanted[: len(rows)])
    rank = np.array(of_requests[: len(rows)])
    held = reserve(a, floors, rank, ceiling)
    found = plan_lengths(
        a, linear(slope), ceiling=ceiling, search=search, weights=rank, reserved=held
    )
    assert (np.array(found.lengths) >= held).all()
    total = sum(found.lengths)
    assert ceiling is None or total <= ceiling
    for row, size, n, floor in zip(a, sizes_of(a), held, floors, strict=True):
        if n:  # no longer than it must be
            assert float(row[: n - 1].sum()) < floor
        if ceiling is None and float(row[:size].sum()) > floor + 1e-5:
            assert float(row[:n].sum()) >= floor - 1e-5  # feasible, and so respected


def test_of_floors_that_cannot_all_be_met_the_higher_rank_goes_first() -> None:
    a = survivals([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [0.9, 0.9, 0.9]])
    held = reserve(a, np.array([2.0, 2.0, 2.0]), np.array([1.0, 3.0, 2.0]), ceiling=5)
    assert held.tolist() == [0, 3, 2]


@given(some_confidences, st.lists(st.floats(0.0, 4.0), min_size=6, max_size=6), st.integers(0, 5))
def test_whether_a_position_is_held_is_known_before_its_token(
    rows: list[list[float]], wanted: list[float], at: int
) -> None:
    """What survivals after position `at` are decides nothing about `at` and what is before it."""
    a = survivals(rows)
    floors, rank = np.array(wanted[: len(rows)]), np.ones(len(rows))
    other = a.copy()
    later = np.arange(a.shape[1]) > at
    other[:, later] = np.where(other[:, later] > ABSENT, 0.0, ABSENT)
    one, two = reserve(a, floors, rank), reserve(other, floors, rank)
    assert (np.minimum(one, at + 1) == np.minimum(two, at + 1)).all()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("search", "expected"), [("causal", 0.70), ("ranked", 0.70), ("global", 0.85)]
)
def test_appendix_a(search: Search, expected: float) -> None:
    """The paper's example, through our planner and our acceptance.

    γ = 2, SPS = (1, 0.5, 0.45), p_t = (0.7, 0.3), p_d = (0.5, 0.5), a_1 = 0.8, and the second
    confidence tells which token was drafted first. With 40,000 draws the estimate's standard error
    is 0.0023, so ±0.01 is missed with probability 1e-5. `ranked` has a capacity of 2.
    """
    step_ms = np.array([np.nan, 1 / 1.0, 1 / 0.5, 1 / 0.45])

    def verified(first: int) -> int:
        a = survivals([[0.8, 1.0 if first == 0 else 0.0]])
        found = plan_lengths(a, lambda least, most: step_ms[least : most + 1], search=search)
        return min(found.lengths[0], 1)  # only the first token emitted is looked at

    def draws(stream: Stream) -> torch.Tensor:
        return uniform(key_tensor([draw_key(seed, stream, 0) for seed in range(40_000)]))

    drafted = (draws(Stream.DRAFT) >= 0.5).long()
    lengths = torch.tensor([verified(0), verified(1)])[drafted]
    admitted = lengths > 0
    drafts = Drafts(
        tuple(lengths.tolist()),
        drafted[admitted],
        torch.arange(2).expand(int(lengths.sum()), 2),
        torch.tensor([0.5, 0.5]).expand(int(lengths.sum()), 2),
    )
    p_t = torch.tensor([0.7, 0.3]).expand(int((1 + lengths).sum()), 2)
    accept, recover = draws(Stream.ACCEPT)[admitted], draws(Stream.RECOVER)
    verdicts = verify_rejection(p_t, drafts, accept, recover)
    emitted = [
        token if verdict.accepted else verdict.next_token_id
        for token, verdict in zip(drafted.tolist(), verdicts, strict=True)
    ]
    assert emitted.count(0) / len(emitted) == pytest.approx(expected, abs=0.01)


@given(
    st.lists(st.lists(st.floats(0.0, 1.0), max_size=3), min_size=1, max_size=3),
    some_weights,
    st.lists(st.floats(0.0, 5.0), min_size=12, max_size=12),
)
def test_a_global_search_finds_the_best_of_all_prefixes(
    rows: list[list[float]], of_requests: list[float], steps: list[float]
) -> None:
    a, weights = survivals(rows), np.array(of_requests[: len(rows)])
    times = 10.0 + np.cumsum(steps)  # as jagged as may be

    def rounds_ms(least: int, most: int) -> DoubleArray:
        return times[least - 1 : most]

    def throughput(lengths: list[int] | tuple[int, ...]) -> float:
        return worth_of(a, lengths, weights) / float(times[len(a) + sum(lengths) - 1])

    found = plan_lengths(a, rounds_ms, search="global", weights=weights)
    best = max(map(throughput, itertools.product(*(range(n + 1) for n in sizes_of(a)))))
    assert throughput(found.lengths) == pytest.approx(best, rel=1e-5)


@given(
    st.lists(st.lists(st.floats(0.0, 1.0), max_size=3), min_size=1, max_size=3),
    st.floats(0.1, 20.0),
    st.lists(st.floats(0.0, 5.0), min_size=12, max_size=12),
)
def test_algorithm_1_finds_it_too_where_more_tokens_cost_ever_more(
    rows: list[list[float]], start: float, steps: list[float]
) -> None:
    a = survivals(rows)
    times = start + np.cumsum(np.sort(steps))  # convex, so that Θ has one top

    def rounds_ms(least: int, most: int) -> DoubleArray:
        return times[least - 1 : most]

    found, best = (plan_lengths(a, rounds_ms, search=search) for search in ("causal", "global"))
    assert found.throughput == pytest.approx(best.throughput, rel=1e-5)
