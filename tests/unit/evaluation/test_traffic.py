"""Arrivals and lengths follow the laws that were asked for; nonsense is refused by name."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dspark.errors import ConfigError
from dspark.evaluation.traffic import (
    ClosedLoop,
    Fixed,
    Lengths,
    Lognormal,
    Poisson,
    Uniform,
    Workload,
    closed_loops,
    lengths,
    poissons,
)

FALSE_ALARMS = 1e-4  # of each statistical test


@pytest.mark.statistical
@pytest.mark.parametrize("rate_per_s", [0.5, 20.0])
def test_poisson_gaps_are_exponential(rate_per_s: float) -> None:
    gaps = list(itertools.islice(Poisson(rate_per_s).gaps_s(random.Random(3)), 2000))
    assert stats.kstest(gaps, stats.expon(scale=1 / rate_per_s).cdf).pvalue > FALSE_ALARMS
    assert stats.spearmanr(gaps[:-1], gaps[1:]).pvalue > FALSE_ALARMS


@pytest.mark.statistical
def test_poisson_counts_are_as_spread_as_their_mean() -> None:
    due = itertools.accumulate(Poisson(5.0).gaps_s(random.Random(4)))
    counts = [0] * 400
    for moment in itertools.takewhile(lambda moment: moment < len(counts), due):
        counts[int(moment)] += 1
    dispersion = sum((n - statistics.mean(counts)) ** 2 for n in counts) / statistics.mean(counts)
    low, high = stats.chi2(len(counts) - 1).interval(1 - FALSE_ALARMS)
    assert low < dispersion < high


@pytest.mark.statistical
def test_lognormal_lengths_have_the_mean_and_the_spread() -> None:
    rng = random.Random(5)
    drawn = [Lognormal(1000.0, 0.5, 1, 10**6).draw(rng) for _ in range(2000)]
    law = stats.lognorm(0.5, scale=1000.0 / stats.lognorm(0.5).mean())
    assert stats.kstest(drawn, law.cdf).pvalue > FALSE_ALARMS


LAWS = st.one_of(
    st.builds(Fixed, st.integers(1, 999)),
    st.builds(lambda a, b: Uniform(min(a, b), max(a, b)), st.integers(1, 999), st.integers(1, 999)),
    st.builds(
        lambda mean, sigma, a, b: Lognormal(mean, sigma, min(a, b), max(a, b)),
        st.floats(0.1, 1e4),
        st.floats(0.01, 5),
        st.integers(1, 999),
        st.integers(1, 999),
    ),
)


@given(LAWS, st.integers())
def test_lengths_keep_their_bounds_and_their_seed(law: Lengths, seed: int) -> None:
    drawn = [law.draw(rng) for rng in [random.Random(seed)] for _ in range(20)]
    assert drawn == [law.draw(rng) for rng in [random.Random(seed)] for _ in range(20)]
    low, high = (law.length,) * 2 if isinstance(law, Fixed) else (law.low, law.high)
    assert all(low <= length <= high and isinstance(length, int) for length in drawn)


def test_specs_are_read() -> None:
    assert lengths("--x", "128") == Fixed(128)
    assert lengths("--x", "uniform:32..256") == Uniform(32, 256)
    assert lengths("--x", "lognormal:128,0.8,16..512") == Lognormal(128.0, 0.8, 16, 512)
    assert closed_loops("--x", "1,8") == [ClosedLoop(1), ClosedLoop(8)]
    assert poissons("--x", "0.5,2") == [Poisson(0.5), Poisson(2.0)]
    assert list(map(str, (ClosedLoop(1), ClosedLoop(8), Poisson(0.5)))) == [
        "1 user",
        "8 users",
        "0.5 req/s",
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "such as 128"),
        ("0", "from 1 on"),
        ("1.5", "'1.5'"),
        ("normal:3", "'normal:3'"),
        ("uniform:32", "LOW..HIGH"),
        ("uniform:9..3", "lower bound first"),
        ("uniform:0..3", "from 1 on"),
        ("lognormal:128", "a mean, a sigma and bounds"),
        ("lognormal:0,1,1..2", "above 0"),
        ("lognormal:nan,1,1..2", "above 0"),
        ("lognormal:128,inf,1..2", "above 0"),
        ("lognormal:128,0.8,16", "LOW..HIGH"),
    ],
)
def test_a_wrong_length_is_named(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match="--lengths wants") as caught:
        lengths("--lengths", spec)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "1.5", "x"])
def test_a_wrong_number_of_users_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--concurrency wants whole numbers"):
        closed_loops("--concurrency", text)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "nan", "inf", "x"])
def test_a_wrong_rate_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate wants numbers above 0"):
        poissons("--rate", text)


def test_asks_take_the_texts_in_turn() -> None:
    asks = Workload(("a", "b"), Fixed(7)).asks("seed")
    assert [(a.prompt, a.max_tokens) for a in itertools.islice(asks, 3)] == [
        ("a", 7),
        ("b", 7),
        ("a", 7),
    ]


def test_prompts_of_words_have_their_number_and_the_same_for_a_seed() -> None:
    workload = Workload(("one two three", "four five"), Uniform(1, 9), Fixed(12))
    first, again, other = (
        list(itertools.islice(workload.asks(seed), 20)) for seed in ("a", "a", "b")
    )
    assert first == again != other
    assert {len(ask.prompt.split()) for ask in first} == {12}
    words = {"one", "two", "three", "four", "five"}
    assert {word for ask in first for word in ask.prompt.split()} == words


def test_marks_change_the_prompts_beginnings_and_nothing_else() -> None:
    workload = Workload(("a", "b"), Uniform(1, 100))
    plain, ours, theirs = (
        list(itertools.islice(workload.asks("seed", mark), 6)) for mark in ("", "0", "1")
    )
    assert len({ask.prompt for ask in ours + theirs}) == 12
    assert [ask.max_tokens for ask in ours] == [ask.max_tokens for ask in plain]
    assert all(ask.prompt.endswith(text.prompt) for ask, text in zip(ours, plain, strict=True))
