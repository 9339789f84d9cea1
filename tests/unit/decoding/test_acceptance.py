"""Verification: exact laws by integrating over the draws, and equality's few rules."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dspark.decoding.acceptance import Drafts, Places, coupled_choices, sample
from dspark.decoding.noise import Stream, draw_key, key_tensor
from tests.helpers.verdicts import verify_equal, verify_rejection

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


class Case(NamedTuple):
    """Sequences of one batch, each on its own: rows, drafts, and the draws."""

    lengths: tuple[int, ...]
    law: torch.Tensor  # [R, 6]
    drafts: Drafts
    accept: torch.Tensor  # [D]
    recover: torch.Tensor  # [S]

    def alone(self, s: int) -> Case:
        row = s + sum(self.lengths[:s])
        rows = slice(row, row + self.lengths[s] + 1)
        own = slice(row - s, row - s + self.lengths[s])
        ids, probs = self.drafts.candidate_ids, self.drafts.candidate_probs
        assert ids is not None
        assert probs is not None
        drafts = Drafts((self.lengths[s],), self.drafts.token_ids[own], ids[own], probs[own])
        length = (self.lengths[s],)
        return Case(length, self.law[rows], drafts, self.accept[own], self.recover[s : s + 1])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    total = sum(lengths)
    law = torch.softmax(torch.randn(total + len(lengths), 6, generator=generator), -1)
    candidates = torch.rand(total, 6, generator=generator).argsort(-1)[:, :3]
    probs = torch.softmax(torch.randn(total, 3, generator=generator), -1)
    return Case(
        lengths,
        law,
        Drafts(lengths, candidates[:, 0], candidates, probs),
        torch.rand(total, generator=generator, dtype=torch.float64),
        torch.rand(len(lengths), generator=generator, dtype=torch.float64),
    )


@given(cases())
def test_the_sequences_of_a_batch_are_judged_each_alone(case: Case) -> None:
    alone = [case.alone(s) for s in range(len(case.lengths))]
    together = verify_rejection(case.law, case.drafts, case.accept, case.recover)
    assert together == [
        verify_rejection(one.law, one.drafts, one.accept, one.recover)[0] for one in alone
    ]
    own = case.law.argmax(-1)
    assert verify_equal(own, case.drafts) == [
        verify_equal(one.law.argmax(-1), one.drafts)[0] for one in alone
    ]


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=6))
def test_what_stands_is_the_drafts_before_the_first_refused(flags: list[list[bool]]) -> None:
    places = Places.of([len(own) for own in flags])
    standing = places.standing(torch.tensor([flag for own in flags for flag in own]).bool())
    assert standing.tolist() == [[*own, False].index(False) for own in flags]
    rows = [(s, k) for s, own in enumerate(flags) for k in range(len(own) + 1)]
    assert [rows[row] for row in places.first_rows] == [(s, 0) for s in range(len(flags))]
    assert [rows[row] for row in places.judging] == [
        (s, k) for s, own in enumerate(flags) for k in range(len(own))
    ]


@given(st.integers(0, 2**31))
def test_a_draft_from_the_targets_own_law_always_stands(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    law = torch.softmax(torch.randn(4, 6, generator=generator), -1)
    draws = torch.rand(4, generator=generator, dtype=torch.float64)
    drafted = sample(law[:3], draws[:3])
    drafts = Drafts((3,), drafted, torch.arange(6).expand(3, 6), law[:3])
    almost_one = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    (verdict,) = verify_rejection(law, drafts, almost_one, draws[3:])
    assert (verdict.accepted, verdict.next_token_id) == (3, int(sample(law[3:], draws[3:])))


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any), st.floats(0, 1 - 2**-53))
def test_what_has_no_weight_is_never_sampled(parts: list[int], draw: float) -> None:
    chosen = int(sample(law(parts)[None], torch.tensor([draw], dtype=torch.float64)))
    assert parts[chosen] > 0


@pytest.mark.statistical
def test_coupled_choices_follow_the_law() -> None:
    """χ² over 20,000 keys; fails by chance once in 10,000 sets of seeds."""
    keys = key_tensor([draw_key(seed, Stream.COUPLED, 7) for seed in range(20_000)])
    p = law([1, 2, 3, 4, 0]).expand(len(keys), 5)
    seen = coupled_choices(p, keys).bincount(minlength=5)
    assert seen[4] == 0
    assert stats.chisquare(seen[:4].numpy(), [2000, 4000, 6000, 8000]).pvalue > 1e-4
