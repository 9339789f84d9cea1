"""Lengths and arrivals are what their descriptions say."""

from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dspark.errors import ConfigError
from dspark.evaluation.traffic import Lognormal, Uniform, parse_lengths, poisson_arrivals

seeds = st.integers(0, 2**32 - 1)


@given(st.integers(1, 500), st.integers(0, 500), seeds)
def test_lengths_keep_their_bounds(least: int, more: int, seed: int) -> None:
    rng = random.Random(seed)
    median, most = least + more // 2, least + more
    for lengths in (
        parse_lengths(f"uniform:{least}..{most}"),
        parse_lengths(f"lognormal:{median},1.5,{least}..{most}"),
    ):
        assert all(least <= lengths.draw(rng) <= most for _ in range(20))


def test_descriptions() -> None:
    assert parse_lengths("128") == Uniform(128, 128)
    assert parse_lengths("uniform:1..9") == Uniform(1, 9)
    assert parse_lengths("lognormal:96,0.6,8..400") == Lognormal(96, 0.6, 8, 400)


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "many", "uniform:9..1", "uniform:0..4", "lognormal:5,1,6..9"]
)
def test_what_is_no_description_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"uniform:LEAST\.\.MOST"):
        parse_lengths(text)


@pytest.mark.statistical
def test_half_of_lognormal_lengths_lie_below_the_median() -> None:
    """Binomial test, false alarm 1e-4."""
    rng, lengths = random.Random(1), Lognormal(100, 0.7, 1, 100_000)
    below = sum(lengths.draw(rng) < 100 for _ in range(4000))
    assert stats.binomtest(below, 4000, 0.497).pvalue > 1e-4  # 0.003 round to the median itself


@pytest.mark.statistical
def test_gaps_between_arrivals_are_exponential() -> None:
    """Kolmogorov-Smirnov, false alarm 1e-4; a steady drip is found out."""
    times = list(islice(poisson_arrivals(4.0, random.Random(2)), 2000))
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert stats.kstest(gaps, "expon", args=(0, 0.25)).pvalue > 1e-4
    assert stats.kstest([0.25] * 2000, "expon", args=(0, 0.25)).pvalue < 1e-4
