"""Acceptance measures agree with each other and with counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.evaluation.acceptance import (
    THRESHOLDS,
    accepted_drafts,
    accepted_length,
    conditional_acceptance,
    prefix_survival,
    threshold_sweep,
    times_tested,
)
from dspark.evaluation.bootstrap import prompt_weights
from dspark.evaluation.rounds import Rounds, joined

Row = tuple[int, int, int, bool, list[float]]  # prompt, verified, accepted, ended by a draft, c


@st.composite
def rows(draw: st.DrawFn, *, whole: bool = False) -> list[Row]:
    prompts, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    made: list[Row] = []
    for prompt in range(prompts):
        for _ in range(draw(st.integers(1, 6))):
            verified = width if whole else draw(st.integers(0, width))
            accepted = draw(st.integers(0, verified))
            confidences = draw(st.lists(st.floats(0.0, 1.0), min_size=verified, max_size=verified))
            made.append((prompt, verified, accepted, False, confidences))
        if not whole and accepted and draw(st.booleans()):
            made[-1] = (prompt, accepted, accepted, True, confidences[:accepted])
    return made


def rounds(made: list[Row]) -> Rounds:
    width = max(verified for _, verified, *_ in made)
    confidences = np.full((len(made), width), np.nan, dtype=np.float32)
    for row, (_, verified, _, _, own) in zip(confidences, made, strict=True):
        row[:verified] = own
    prompt, verified, accepted, ended, _ = zip(*made, strict=True)
    return Rounds(
        max(prompt) + 1,
        np.array(prompt),
        np.array(verified),
        np.array(accepted),
        np.array(accepted) + 1 - np.array(ended),
        confidences,
    )


def one(of: Rounds) -> np.ndarray:
    """The sample alone, without draws."""
    return np.ones((1, of.prompts))


@given(rows(whole=True))
def test_whole_blocks_survivals_add_up_to_the_accepted_length(made: list[Row]) -> None:
    of = rounds(made)
    conditional = conditional_acceptance(of, one(of))
    survival = np.nan_to_num(prefix_survival(conditional))[0]
    by_hand = [np.mean([accepted > k for _, _, accepted, _, _ in made]) for k in range(of.width)]
    assert survival == pytest.approx(by_hand)
    assert accepted_drafts(of, one(of))[0] == pytest.approx(survival.sum())
    assert accepted_length(of, one(of))[0] == pytest.approx(1.0 + survival.sum())


@given(rows())
def test_a_position_counts_where_it_was_put_to_the_test(made: list[Row]) -> None:
    of = rounds(made)
    conditional, counts = conditional_acceptance(of, one(of))[0], times_tested(of)
    for k in range(of.width):
        outcomes = [stood > k for _, verified, stood, _, _ in made if stood >= k and verified > k]
        assert counts[k] == len(outcomes)
        assert conditional[k] == pytest.approx(
            np.mean(outcomes) if outcomes else np.nan, nan_ok=True
        )


@given(rows())
def test_the_sweep_starts_at_all_and_only_ever_cuts(made: list[Row]) -> None:
    of = rounds(made)
    sweep = threshold_sweep(of, one(of))
    assert sweep.n[0] == of.verified.sum()
    assert sweep.accepted_length[0, 0] == pytest.approx(accepted_length(of, one(of))[0])
    assert (np.diff(sweep.n) <= 0).all()
    assert (np.diff(sweep.accepted_length[0]) <= 1e-12).all()
    for t, threshold in enumerate(THRESHOLDS):
        kept = []
        for _, verified, _, _, own in made:
            low = [k for k in range(verified) if np.float32(own[k]) < np.float32(threshold)]
            kept.append(min(low, default=verified))
        accepted = sum(min(a, length) for (_, _, a, _, _), length in zip(made, kept, strict=True))
        assert sweep.kept[0, t] == pytest.approx(np.mean(kept))
        assert sweep.acceptance[0, t] == pytest.approx(
            accepted / sum(kept) if sum(kept) else np.nan, nan_ok=True
        )


@given(rows(), rows())
def test_draws_of_prompts_are_what_their_rounds_give(first: list[Row], second: list[Row]) -> None:
    """A draw's weights say the same as its prompts' rounds written out."""
    of = joined([rounds(first), rounds(second)])
    weights = prompt_weights(of.prompts, seed=3)[:4]
    for row in weights[1:]:
        written_out = np.repeat(np.arange(of.prompts), row.astype(int))
        taken = np.concatenate([np.flatnonzero(of.prompt == p) for p in written_out])
        drawn = Rounds(
            1,
            np.zeros(len(taken), dtype=np.int64),
            of.verified[taken],
            of.accepted[taken],
            of.tokens[taken],
            of.confidences[taken],
        )
        for measure in (accepted_length, conditional_acceptance):
            expected = measure(drawn, one(drawn))[0]
            assert measure(of, row[None])[0] == pytest.approx(expected, nan_ok=True)
