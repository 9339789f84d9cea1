"""Marginal throughput and prefix affinity: fair, steady, and never in favour of who has more."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dspark.scheduling.placement import Ask, Candidate, Curve, choose
from dspark.scheduling.step_means import RunningMeans, StepMeans
from dspark.scheduling.step_table import StepTimeTable

MEANS = StepMeans(committed=3.0, rows=4.0, context=100.0)


def table(
    per_request: float = 1.0, per_row: float = 0.1, padded: tuple[int, ...] = ()
) -> StepTimeTable:
    """Steps of 5 ms and so much more; context costs a little."""
    requests, rows, contexts = (1, 8, 64), (1, 5, 300), (1, 4000)
    times = tuple(
        tuple(
            tuple(5.0 + r * (per_request + q * per_row) * (1.0 + c / 4000) for q in rows)
            for r in requests
        )
        for c in contexts
    )
    return StepTimeTable(requests, rows, contexts, times, padded)


PADDED = st.lists(st.integers(1, 300), max_size=5, unique=True).map(lambda x: tuple(sorted(x)))
TABLES = st.builds(table, st.floats(0.0, 5.0), st.floats(0.001, 1.0), PADDED)
STEP_MEANS = st.builds(
    StepMeans,
    committed=st.floats(1.0, 8.0),
    rows=st.floats(1.0, 8.0),
    context=st.floats(0.0, 5000.0),
    slow=st.floats(0.1, 10.0),
)
CURVES = st.builds(Curve.of, TABLES, STEP_MEANS, st.integers(1, 80))


def candidate(name: str, curve: st.SearchStrategy[Curve | None]) -> st.SearchStrategy[Candidate]:
    return st.builds(
        Candidate,
        name=st.just(name),
        requests=st.integers(0, 40),
        queued=st.integers(0, 5),
        most_requests=st.sampled_from([0, 8, 32]),
        free_pages=st.integers(0, 200),
        page_tokens=st.sampled_from([0, 16]),
        curve=curve,
    )


def several(curve: st.SearchStrategy[Curve | None]) -> st.SearchStrategy[list[Candidate]]:
    return st.integers(1, 4).flatmap(
        lambda n: st.tuples(*(candidate(str(i), curve) for i in range(n))).map(list)
    )


ASKS = st.builds(
    Ask,
    prompt_tokens=st.integers(1, 2000),
    max_tokens=st.integers(1, 400),
    cached=st.dictionaries(st.sampled_from("0123"), st.integers(0, 2000)),
)


@given(several(CURVES | st.none()), ASKS, st.randoms(use_true_random=False))
def test_the_choice_hangs_on_the_candidates_alone(
    candidates: list[Candidate], ask: Ask, order: object
) -> None:
    chosen = choose(candidates, ask)
    shuffled = candidates.copy()
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(shuffled, ask) == chosen
    assert chosen in candidates


@given(several(CURVES) | several(st.none()), ASKS, st.integers(1, 40))
def test_fewer_requests_never_make_a_verifier_less_attractive(
    candidates: list[Candidate], ask: Ask, fewer: int
) -> None:
    ask = replace(ask, cached={})
    chosen = choose(candidates, ask)
    lighter = replace(chosen, requests=max(0, chosen.requests - fewer))
    assert choose([lighter if c == chosen else c for c in candidates], ask).name == chosen.name


@given(CURVES, st.lists(st.integers(0, 40), min_size=1, max_size=4), ASKS, st.integers(1, 40))
def test_nor_do_they_beside_prefixes_among_verifiers_of_a_kind(
    curve: Curve, requests: list[int], ask: Ask, fewer: int
) -> None:
    candidates = [Candidate(str(i), n, curve=curve) for i, n in enumerate(requests)]
    chosen = choose(candidates, ask)
    lighter = replace(chosen, requests=max(0, chosen.requests - fewer))
    assert choose([lighter if c == chosen else c for c in candidates], ask).name == chosen.name


@given(TABLES, STEP_MEANS, st.integers(1, 80))
def test_curves_only_fall_and_come_to_the_throughput(
    steps: StepTimeTable, means: StepMeans, most: int
) -> None:
    curve = Curve.of(steps, means, most)
    assert len(curve.gains) == len(curve.token_ms) == most
    assert all(a >= b - 1e-9 * abs(a) for a, b in pairwise(curve.gains))
    assert all(a <= b for a, b in pairwise(curve.token_ms))
    assert sum(curve.gains) == pytest.approx(1e3 * most / curve.token_ms[-1], rel=1e-6)
    assert curve.prefill_ms >= 0.0


@given(several(CURVES | st.none()), ASKS)
def test_who_has_no_room_is_a_last_resort(candidates: list[Candidate], ask: Ask) -> None:
    assume(any(c.has_room(ask.prompt_tokens) for c in candidates))
    assert choose(candidates, ask).has_room(ask.prompt_tokens)


def test_where_all_are_full_the_shortest_queue_counts() -> None:
    full = [Candidate("a", 12, 4, most_requests=8), Candidate("b", 34, 2, most_requests=32)]
    assert choose(full, Ask()).name == "b"


def test_a_prompt_that_has_no_pages_goes_where_it_has() -> None:
    some = Candidate("a", 0, free_pages=10, page_tokens=16)
    more = Candidate("b", 3, free_pages=40, page_tokens=16)
    assert choose([some, more], Ask(prompt_tokens=160)).name == "a"
    assert choose([some, more], Ask(prompt_tokens=161)).name == "b"


def test_the_faster_verifier_gets_more_until_it_gains_as_little() -> None:
    fast, slow = Curve.of(table(0.2), MEANS, 32), Curve.of(table(3.0, 1.0), MEANS, 32)
    placed = {"fast": 0, "slow": 0}
    for _ in range(16):
        both = [Candidate("fast", placed["fast"], curve=fast),
                Candidate("slow", placed["slow"], curve=slow)]  # fmt: skip
        placed[choose(both, Ask()).name] += 1
    assert placed["fast"] > placed["slow"]
    assert fast.gain(placed["fast"] - 1) >= slow.gain(placed["slow"]) * 0.8


def test_equal_verifiers_share_although_their_means_differ_by_noise() -> None:
    curves = [Curve.of(table(0.0, 1e-6), replace(MEANS, committed=c), 32) for c in (3.0, 3.1)]
    placed = [0, 0]
    for _ in range(20):
        some = [Candidate(str(i), placed[i], curve=curves[i]) for i in range(2)]
        placed[int(choose(some, Ask()).name)] += 1
    assert placed == [10, 10]


def test_one_verifier_that_is_not_known_makes_the_least_busy_count() -> None:
    known = Candidate("known", 3, curve=Curve.of(table(), MEANS, 32))
    assert choose([known, Candidate("new", 2)], Ask()).name == "new"
    assert choose([known, Candidate("new", 4)], Ask()).name == "known"


CURVE = Curve.of(table(), MEANS, 64)


@pytest.mark.parametrize(
    ("requests", "cached", "chosen"),
    [
        (0, 16, "cached"),  # equally busy: even a little counts
        (1, 1024, "cached"),  # 1024 tokens save more than a request costs
        (1, 16, "idle"),  # 16 do not
        (9, 100_000, "idle"),  # too far from balance, whatever it saves
    ],
)
def test_a_prefix_weighs_against_slower_steps(requests: int, cached: int, chosen: str) -> None:
    both = [Candidate("cached", requests, curve=CURVE), Candidate("idle", 0, curve=CURVE)]
    assert choose(both, Ask(2048, 100, {"cached": cached})).name == chosen


def test_a_prefix_is_worth_one_request_where_times_are_not_known() -> None:
    ask = Ask(2048, 100, {"cached": 512})
    assert choose([Candidate("cached", 3), Candidate("idle", 2)], ask).name == "cached"
    assert choose([Candidate("cached", 4), Candidate("idle", 2)], ask).name == "idle"


def test_a_prefix_where_there_is_no_room_is_passed_over() -> None:
    full = Candidate("cached", 8, most_requests=8, curve=CURVE)
    assert choose([full, Candidate("b", 7, curve=CURVE)], Ask(64, 8, {"cached": 64})).name == "b"


# -- what curves are made of ------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(-5, 50)] * 4), max_size=100))
def test_means_are_of_steps_that_can_be(steps: list[tuple[int, int, int, int]]) -> None:
    means = RunningMeans()
    for requests, committed, rows, context in steps:
        means.add(requests, committed, rows, abs(context))
    possible = [s for s in steps if 0 < s[0] <= s[1] <= s[2]]
    assert (means.now is None) == (not possible)
    if means.now is not None:
        assert 1.0 - 1e-9 <= means.now.committed <= means.now.rows + 1e-9
        assert means.now.slow == 1.0


def test_means_follow_what_changes() -> None:
    means = RunningMeans()
    for committed in [4] * 500 + [1] * 500:
        means.add(1, committed, 5, 10)
    assert means.now is not None
    assert means.now.committed == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_round_that_cannot_be_does_no_harm(nonsense: float) -> None:
    means = RunningMeans()
    means.add(1, 1, 1, 1)
    for slow in [2.0] * 9 + [nonsense]:
        means.add(1, 1, 1, 1, slow)
    assert means.now is not None
    assert 2.0 <= means.now.slow < 3.0
