"""When draft replicas are saturated, and what a verifier then gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.draft_quota import is_saturated, max_blocks

speeds = st.floats(1.0, 1e4)
steps = st.floats(0.001, 1.0)


@pytest.mark.parametrize(
    ("busy", "queued", "was", "expected"),
    [
        (0.95, 3, False, True),
        (0.95, 0, False, False),  # busy, and nobody waits
        (0.5, 9, False, False),  # a burst
        (0.8, 0, True, True),  # the bound keeps it just below
        (0.6, 9, True, False),
    ],
)
def test_saturation_begins_high_and_ends_low(
    busy: float, queued: int, was: bool, expected: bool
) -> None:
    assert is_saturated(busy, queued, was) is expected


@given(st.integers(2, 32), speeds, steps)
def test_the_others_blocks_are_drafted_within_a_step(
    verifiers: int, works_per_s: float, step_s: float
) -> None:
    blocks = max_blocks([(1.0 / verifiers, works_per_s)], step_s)
    if blocks > 1:
        assert (verifiers - 1) * blocks / works_per_s <= step_s * (1 + 1e-9)
    assert (verifiers - 1) * (blocks + 1) / works_per_s >= step_s * (1 - 1e-9)


@given(speeds, steps)
def test_several_replicas_bring_as_much_as_all_of_them(works_per_s: float, step_s: float) -> None:
    one = max_blocks([(1.0, works_per_s)], step_s)
    three = max_blocks([(1.0, works_per_s)] * 3, step_s)
    assert one >= 1
    assert 3 * one - 2 <= three <= 3 * one + 3


def test_without_figures_there_is_no_bound() -> None:
    assert max_blocks([], 0.1) == 0
    assert max_blocks([(0.5, 0.0)], 0.1) == 0
    assert max_blocks([(1.0, 100.0), (1.0, 0.0)], 0.1) == 0
    assert max_blocks([(0.5, 100.0)], 0.0) == 0
