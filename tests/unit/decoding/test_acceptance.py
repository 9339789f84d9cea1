"""Verification: exact laws by integrating over the draws, and equality's few rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.decoding.acceptance import Drafts, verify_equal, verify_rejection

weights = st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(any)
GRID = 400


def law(parts: list[int]) -> torch.Tensor:
    return torch.tensor(parts, dtype=torch.float32) / sum(parts)


@given(weights, weights)
def test_what_is_emitted_follows_the_target(p_parts: list[int], q_parts: list[int]) -> None:
    """Sum over drafted tokens, and over even grids of both draws: no sampling error remains."""
    p, q = law(p_parts), law(q_parts)
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    emitted = torch.zeros(5, dtype=torch.float64)
    for x in range(5):
        if q[x] == 0:
            continue
        drafts = Drafts(
            (1,) * GRID,
            torch.full((GRID,), x),
            torch.arange(5).expand(GRID, 5),
            q.expand(GRID, 5),
        )
        accepted = [v.accepted for v in verify_rejection(p.expand(2 * GRID, 5), drafts, grid, grid)]
        share = sum(accepted) / GRID
        assert share == pytest.approx(min(1.0, float(p[x] / q[x])), abs=1 / GRID)
        emitted[x] += float(q[x]) * share
        if share < 1:
            refused = torch.ones(GRID, dtype=torch.float64)  # an accept draw that never accepts
            verdicts = verify_rejection(p.expand(2 * GRID, 5), drafts, refused, grid)
            for verdict in verdicts:
                emitted[verdict.next_token_id] += float(q[x]) * (1 - share) / GRID
    torch.testing.assert_close(emitted, p.double(), atol=4 / GRID, rtol=0)


def test_after_full_acceptance_the_bonus_follows_the_last_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    drafts = Drafts((1,), torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[1.0]]))
    (verdict,) = verify_rejection(rows, drafts, torch.tensor([0.5]), torch.tensor([0.5]))
    assert (verdict.accepted, verdict.next_token_id) == (1, 1)


def test_a_token_that_the_target_excludes_never_stands() -> None:
    p = torch.tensor([[0.0, 1.0]]).expand(2, 2)
    drafts = Drafts((1,), torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
    (verdict,) = verify_rejection(p, drafts, torch.tensor([1e-12]), torch.tensor([0.0]))
    assert (verdict.accepted, verdict.next_token_id) == (0, 1)


def test_rejection_without_a_law_is_refused() -> None:
    drafts = Drafts((1,), torch.tensor([0]))
    with pytest.raises(ValueError, match="candidates"):
        verify_rejection(torch.ones(2, 2) / 2, drafts, torch.ones(1), torch.ones(1))


def test_equality_stops_at_the_first_difference_of_each_sequence() -> None:
    choices = torch.tensor([4, 5, 6, 1, 9, 9])
    drafts = Drafts((2, 0, 1), torch.tensor([4, 7, 9]))
    verdicts = verify_equal(choices, drafts)
    assert [(v.accepted, v.next_token_id) for v in verdicts] == [(1, 5), (0, 1), (1, 9)]
