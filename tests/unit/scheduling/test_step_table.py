"""Step times: read between the measured points, go on beyond them, refuse nonsense."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError
from dspark.scheduling.step_table import StepTimeTable

TABLE = StepTimeTable((1, 8), (1, 5), ((10.0, 14.0), (24.0, 56.0)))


def test_measured_points_are_returned_as_they_are() -> None:
    assert TABLE.ms(1, 1) == 10.0
    assert TABLE.ms(1, 5) == 14.0
    assert TABLE.ms(8, 8) == 24.0
    assert TABLE.ms(8, 40) == 56.0


def test_between_points_it_interpolates_and_beyond_it_goes_on() -> None:
    assert TABLE.ms(1, 3) == pytest.approx(12.0)
    assert TABLE.ms(1, 9) == pytest.approx(18.0)
    assert TABLE.ms(15, 15) == pytest.approx(38.0)


@given(st.integers(1, 64), st.integers(1, 512))
def test_more_tokens_never_take_less_time(requests: int, tokens: int) -> None:
    assert TABLE.ms(requests, tokens + 1) >= TABLE.ms(requests, tokens)


@given(st.integers(1, 64), st.lists(st.integers(0, 512), min_size=1, max_size=20))
def test_many_times_are_those_of_one(requests: int, extra: list[int]) -> None:
    tokens = requests + np.array(extra, dtype=np.float64)
    alone = [TABLE.ms(requests, float(each)) for each in tokens]
    assert TABLE.times_ms(requests, tokens) == pytest.approx(alone)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([1, 2, 6])),
        st.lists(st.floats(0.1, 100.0), min_size=1, max_size=5),
        min_size=9,
        max_size=9,
    )
)
def test_samples_become_a_monotone_table(samples: dict[tuple[int, int], list[float]]) -> None:
    table = StepTimeTable.from_samples(samples)  # refuses by itself what is not monotone
    for requests in (1, 3, 8):
        times = [table.ms(requests, tokens) for tokens in range(requests, 10 * requests)]
        assert all(b >= a - 1e-9 for a, b in pairwise(times))


@pytest.mark.parametrize(
    ("requests", "rows", "times"),
    [
        ((1,), (1, 2), ((1.0, 2.0),)),
        ((2, 1), (1, 2), ((1.0, 2.0), (1.0, 2.0))),
        ((1, 2), (1, 2), ((1.0, 2.0),)),
        ((1, 2), (1, 2), ((2.0, 1.0), (2.0, 2.0))),
        ((1, 2), (1, 2), ((0.0, 1.0), (1.0, 1.0))),
        ((1, 2), (1, 2), ((1.0, float("nan")), (1.0, 1.0))),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    requests: tuple[int, ...], rows: tuple[int, ...], times: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(ConfigError):
        StepTimeTable(requests, rows, times)
