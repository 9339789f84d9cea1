"""Step times: read between the measured points, go on beyond them, refuse nonsense."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.tables import flat_table
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import StepTableError
from dspark.scheduling.step_table import MAX_TABLE_BYTES, StepTimeTable

TABLE = StepTimeTable(
    (1, 8), (1, 5), (100, 500), (((10.0, 14.0), (24.0, 56.0)), ((12.0, 18.0), (40.0, 80.0)))
)
REQUESTS, ROWS, CONTEXTS = (1, 4, 8), (1, 2, 6), (64, 512)
SIZES = (1, 2, 4, 8, 16, 24, 32)
cells = st.fixed_dictionaries(
    {
        (r, q, c): st.lists(st.floats(0.1, 100.0), min_size=1, max_size=5)
        for r in REQUESTS
        for q in ROWS
        for c in CONTEXTS
    }
)
tables = st.builds(
    StepTimeTable.from_samples,
    cells,
    padded=st.sampled_from([(), SIZES, (3, 5, 64)]),
    fingerprint=st.text(max_size=20),
)
requests_of = st.integers(1, 40)
contexts_of = st.floats(0.0, 5000.0)


def test_measured_points_are_returned_as_they_are() -> None:
    assert TABLE.ms(1, 1, 100) == 10.0
    assert TABLE.ms(1, 5, 100) == 14.0
    assert TABLE.ms(8, 8, 100) == 24.0
    assert TABLE.ms(8, 40, 500) == pytest.approx(80.0)


def test_between_points_it_interpolates_and_beyond_it_goes_on() -> None:
    assert TABLE.ms(1, 3, 100) == pytest.approx(12.0)
    assert TABLE.ms(1, 9, 100) == pytest.approx(18.0)
    assert TABLE.ms(15, 15, 100) == pytest.approx(38.0)
    assert TABLE.ms(1, 1, 300) == pytest.approx(11.0)
    assert TABLE.ms(1, 1, 900) == pytest.approx(14.0)
    assert TABLE.ms(1, 1, 0) == 10.0


def test_a_table_of_one_context_holds_for_all() -> None:
    table = flat_table((1, 8), (1, 5), ((10.0, 14.0), (24.0, 56.0)))
    assert {table.ms(8, 24, context) for context in (0, 1, 77, 9999)} == {40.0}


@given(tables, requests_of, st.integers(0, 300), contexts_of)
def test_more_work_never_takes_less_time(
    table: StepTimeTable, requests: int, extra: int, context: float
) -> None:
    """More tokens, a longer context, or more requests of as many rows each; past the edges too."""
    tokens = requests + extra
    ms = table.ms(requests, tokens, context)
    more = table.ms(requests, tokens + 1, context), table.ms(requests, tokens, context + 9.0)
    assert min(more) >= ms * (1 - 1e-9)
    if not table.padded:
        wider = table.ms(requests + 1, tokens * (requests + 1) / requests, context)
        assert wider >= ms * (1 - 1e-9)


@given(tables, requests_of, st.lists(st.floats(0.0, 512.0), min_size=1, max_size=20), contexts_of)
def test_many_times_are_those_of_one(
    table: StepTimeTable, requests: int, extra: list[float], context: float
) -> None:
    tokens = requests + np.array([*extra, *SIZES])
    alone = [table.ms(requests, float(each), context) for each in tokens]
    assert table.at(context).times_ms(requests, tokens) == pytest.approx(alone)


@given(cells)
def test_samples_that_are_monotone_are_kept(samples: dict[tuple[int, int, int], Any]) -> None:
    for r, q, c in sorted(samples):
        before = [ms for (a, b, d), ms in samples.items() if a <= r and b <= q and d <= c]
        samples[r, q, c] = [max(map(min, before))]
    table = StepTimeTable.from_samples(samples)
    for (r, q, c), (ms,) in samples.items():
        assert table.ms(r, r * q, c) == pytest.approx(ms)


@given(tables, requests_of, contexts_of)
def test_time_stands_still_between_padded_sizes(
    table: StepTimeTable, requests: int, context: float
) -> None:
    for low, high in pairwise((0, *table.padded)):
        at_size = table.ms(requests, high, context)
        for tokens in np.linspace(low, high, 7)[1:]:
            assert table.ms(requests, float(tokens), context) == at_size


def test_time_jumps_behind_a_padded_size() -> None:
    table = StepTimeTable((1, 4), (1, 16), (1,), (((10.0, 25.0), (10.0, 25.0)),), (4, 8))
    assert [table.ms(1, tokens, 0) for tokens in (1, 4, 5, 8, 9)] == [13.0, 13.0, 17.0, 17.0, 18.0]


@given(tables)
def test_a_table_survives_as_text(table: StepTimeTable) -> None:
    assert StepTimeTable.from_json(table.to_json()) == table


def test_a_table_is_refused_where_it_was_not_measured() -> None:
    TABLE.check_fits("")
    with pytest.raises(StepTableError, match="measure again"):
        TABLE.check_fits("elsewhere")


def test_a_slower_machine_takes_longer_everywhere() -> None:
    assert TABLE.scaled(1.5).ms(3, 7, 222) == pytest.approx(1.5 * TABLE.ms(3, 7, 222))


FLAT = [[[1.0, 2.0], [1.0, 2.0]]]


@pytest.mark.parametrize(
    "fields",
    [
        {"requests": [1], "step_ms": [[[1.0, 2.0]]]},
        {"requests": [2, 1]},
        {"requests": [0, 1]},
        {"requests": [1, 1.5]},
        {"requests": [True, 2]},
        {"requests": "12"},
        {"rows": [1, 1 << 30]},
        {"rows": list(range(1, 100))},
        {"contexts": []},
        {"contexts": 1},
        {"padded": [4, 4]},
        {"fingerprint": 1},
        {"fingerprint": "x" * 1000},
        {"step_ms": [[[1.0, 2.0]]]},
        {"step_ms": [[[1.0, 2.0], [1.0]]]},
        {"step_ms": [[["1.0", "2.0"], ["1.0", "2.0"]]]},
        {"step_ms": [[[2.0, 1.0], [2.0, 2.0]]]},
        {"step_ms": [[[1.0, 2.0], [0.5, 2.0]]]},
        {"contexts": [1, 2], "step_ms": [FLAT[0], [[0.5, 2.0], [1.0, 2.0]]]},
        {"step_ms": [[[0.0, 1.0], [1.0, 1.0]]]},
        {"step_ms": [[[float("nan"), 1.0], [1.0, 1.0]]]},
        {"step_ms": [[[1.0, 1.0], [1.0, float("inf")]]]},
        {"step_ms": [[[1.0, 1.0], [1.0, 10**400]]]},
        {"step_ms": None},
        {"more": 1},
    ],
)
def test_a_table_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    whole: dict[str, Any] = {
        "requests": [1, 2],
        "rows": [1, 2],
        "contexts": [1],
        "step_ms": FLAT,
        "padded": [],
        "fingerprint": "",
    }
    StepTimeTable.from_json(json.dumps(whole))
    with pytest.raises(StepTableError):
        StepTimeTable.from_json(json.dumps({**whole, **fields}))


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe", "[]", "[" * 10_000, "{", " " * (MAX_TABLE_BYTES + 1)]
)
def test_text_that_is_no_table_is_refused(text: str | bytes) -> None:
    with pytest.raises(StepTableError):
        StepTimeTable.from_json(text)
