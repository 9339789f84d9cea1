"""Counter-based draws: uniform, independent across streams, and the same wherever computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dspark.decoding import noise
from dspark.decoding.noise import Stream, draw_key, draw_keys, gumbel, key_tensor, uniform

FALSE_ALARM = 1e-4


def draws(stream: Stream, count: int = 20_000) -> torch.Tensor:
    return uniform(key_tensor([draw_key(11, stream, 0, i) for i in range(count)]))


@given(st.integers(0, 2**64 - 1))
def test_integers_and_tensors_mix_alike(word: int) -> None:
    mixed = noise._mix(key_tensor([word]))
    assert mixed.item() == noise._signed(noise._mix_int(word))


@pytest.mark.statistical
@pytest.mark.parametrize("stream", list(Stream))
def test_draws_are_uniform(stream: Stream) -> None:
    assert stats.kstest(draws(stream).numpy(), "uniform").pvalue > FALSE_ALARM


@pytest.mark.statistical
def test_streams_are_independent() -> None:
    columns = [draws(stream).numpy() for stream in Stream]
    for i, a in enumerate(columns):
        for b in columns[:i]:
            assert stats.pearsonr(a, b).pvalue > FALSE_ALARM
            assert not (a == b).any()


def test_gumbel_at_candidates_is_that_of_the_whole_vocabulary() -> None:
    keys = key_tensor([draw_key(5, Stream.COUPLED, p) for p in range(3)])
    everywhere = gumbel(keys, torch.arange(1000))
    candidates = torch.tensor([[3, 999, 0], [7, 7, 1], [500, 2, 4]])
    assert torch.equal(gumbel(keys, candidates), everywhere.gather(1, candidates))


@pytest.mark.statistical
def test_gumbel_noise_is_gumbel() -> None:
    sample = gumbel(key_tensor([draw_key(9, Stream.COUPLED, 1)]), torch.arange(50_000))[0]
    assert stats.kstest(sample.numpy(), "gumbel_r").pvalue > FALSE_ALARM


def test_the_ends_of_the_interval_are_never_drawn() -> None:
    """At 1 a Gumbel draw would be infinite, and choose a token whatever its probability."""
    words = key_tensor([0, 2**64 - 1, 2**63, 2**63 - 1])
    draws = noise._to_unit(words)
    assert ((draws > 0) & (draws < 1)).all()
    assert torch.isfinite(-torch.log(-torch.log(draws))).all()


def test_draws_have_names_of_their_own() -> None:
    names = [
        (seed, stream, a, b)
        for seed in (0, 1, 2**63 - 1)
        for stream in Stream
        for a in range(8)
        for b in range(8)
    ]
    names_without_b = [(seed, stream, a) for seed in (0, 1) for stream in Stream for a in range(8)]
    keys = {draw_key(*name) for name in [*names, *names_without_b]}
    assert len(keys) == len(names) + len(names_without_b)


@given(st.integers(0, 2**63 - 1), st.sampled_from(Stream), st.lists(st.integers(0, 2**40)))
def test_names_made_together_are_those_made_one_by_one(
    seed: int, stream: Stream, counters: list[int]
) -> None:
    last = range(5, 12)
    one_by_one = [draw_key(seed, stream, *counters, k) for k in last]
    assert draw_keys(seed, stream, *counters, last=last) == one_by_one
