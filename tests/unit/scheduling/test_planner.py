"""Algorithm 1: what it admits, and why it stops where it stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.decoding.acceptance import Drafts
from dspark.decoding.noise import Stream, draw_key, key_tensor, uniform
from dspark.scheduling.planner import Search, plan_lengths
from dspark.scheduling.survival import survival
from tests.helpers.verdicts import verify_rejection

confidences = st.lists(st.lists(st.floats(0.0, 1.0, width=32), max_size=6), min_size=1, max_size=6)


def survivals(rows: list[list[float]]) -> list[np.ndarray]:
    return [survival(np.array(row, dtype=np.float32)) for row in rows]


@given(confidences, st.floats(0.0, 5.0), st.integers(0, 8))
def test_it_admits_the_likeliest_tokens_up_to_the_ceiling(
    rows: list[list[float]], slope: float, ceiling: int
) -> None:
    a = survivals(rows)
    lengths = plan_lengths(a, lambda tokens: 10.0 + slope * tokens, max_draft_tokens=ceiling)
    assert all(0 <= n <= len(row) for n, row in zip(lengths, a, strict=True))
    if ceiling:
        assert sum(lengths) <= ceiling
    admitted = [x for n, row in zip(lengths, a, strict=True) for x in row[:n]]
    refused = [x for n, row in zip(lengths, a, strict=True) for x in row[n:]]
    if admitted and refused:
        assert min(admitted) >= max(refused)


@given(confidences, st.floats(0.0, 5.0))
def test_what_it_admits_never_lowers_expected_throughput(
    rows: list[list[float]], slope: float
) -> None:
    a = survivals(rows)
    lengths = plan_lengths(a, lambda tokens: 10.0 + slope * tokens)
    expected = len(a) + sum(float(row[:n].sum()) for n, row in zip(lengths, a, strict=True))
    tokens = len(a) + sum(lengths)
    assert expected / (10.0 + slope * tokens) >= len(a) / (10.0 + slope * len(a)) - 1e-9


def flat(tokens: np.ndarray) -> np.ndarray:
    return np.full(len(tokens), 10.0)


def test_free_tokens_are_all_admitted_and_dear_ones_are_not() -> None:
    a = survivals([[0.9, 0.5], [0.3]])
    assert plan_lengths(a, flat) == [2, 1]
    assert plan_lengths(a, lambda tokens: 10.0 * tokens) == [0, 0]
    assert plan_lengths([], flat) == []


def test_prompt_tokens_in_the_step_are_paid_for() -> None:
    def knee(tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens <= 8, 10.0, 10.0 * tokens)

    a = survivals([[0.9, 0.9, 0.9]])
    assert plan_lengths(a, knee) == [3]
    assert plan_lengths(a, knee, extra_tokens=6) == [1]


def test_calibration_flattens_survival() -> None:
    raw = np.array([0.9, 0.9], dtype=np.float32)
    assert survival(raw, (2.0, 2.0))[1] < survival(raw)[1]
    assert survival(raw, (2.0,))[0] == pytest.approx(0.75, abs=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize(("search", "expected"), [("causal", 0.70), ("global", 0.85)])
def test_appendix_a(search: Search, expected: float) -> None:
    """The paper's example, through our planner and our acceptance.

    γ = 2, SPS = (1, 0.5, 0.45), p_t = (0.7, 0.3), p_d = (0.5, 0.5), a_1 = 0.8, and the second
    confidence tells which token was drafted first. With 40,000 draws the estimate's standard error
    is 0.0023, so ±0.01 is missed with probability 1e-5.
    """
    step_ms = np.array([np.nan, 1 / 1.0, 1 / 0.5, 1 / 0.45])

    def verified(first: int) -> int:
        a = survival(np.array([0.8, 1.0 if first == 0 else 0.0], dtype=np.float32))
        (length,) = plan_lengths([a], lambda tokens: step_ms[tokens.astype(int)], search=search)
        return min(length, 1)  # only the first token emitted is looked at

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


@given(confidences, st.lists(st.floats(0.0, 5.0), min_size=40, max_size=40))
def test_a_global_search_finds_the_best_of_all_counts(
    rows: list[list[float]], steps: list[float]
) -> None:
    a = survivals(rows)
    times = 10.0 + np.cumsum(steps)  # as jagged as may be

    def step_ms(tokens: np.ndarray) -> np.ndarray:
        return times[tokens.astype(int) - 1]

    def throughput(lengths: list[int]) -> float:
        expected = len(a) + sum(float(row[:n].sum()) for n, row in zip(lengths, a, strict=True))
        return expected / float(times[len(a) + sum(lengths) - 1])

    found = throughput(plan_lengths(a, step_ms, search="global"))
    assert found >= throughput(plan_lengths(a, step_ms, search="causal")) - 1e-9
    most = sum(len(row) for row in a)
    for ceiling in range(1, most + 1):
        free = plan_lengths(a, lambda tokens: np.ones(len(tokens)), max_draft_tokens=ceiling)
        assert found >= throughput(free) - 1e-6
