"""What a verifier tells of its blocks: bounded, cut to the drafter's γ, and drawn evenly."""

from __future__ import annotations

import numpy as np

from dspark.scheduling.outcomes import MOST_BLOCKS, OutcomeSample
from dspark.types import RAW_SCALES, Scale, Scales, VerificationResult

STEPS = 16
SCALES = Scales(greedy=Scale((1.5,)))


def result(*confidences: float, accepted: int = 0) -> VerificationResult:
    size = len(confidences)
    return VerificationResult(
        "r", (1,), size, size, accepted, confidences=confidences, greedy=accepted > 0
    )


def test_few_steps_are_told_of_at_once_and_plain_ones_not_at_all() -> None:
    sample = OutcomeSample(3)
    for step in range(STEPS):
        assert sample.take(RAW_SCALES) is None
        sample.add([result(0.5, 0.25, accepted=1), result()] if step == 3 else [result()])
    got = sample.take(SCALES)
    assert got is not None
    np.testing.assert_array_equal(got.confidences, np.array([[0.5, 0.25, np.nan]]))
    assert (got.verified.tolist(), got.accepted.tolist()) == ([2], [1])
    assert got.greedy.tolist() == [True]
    assert got.scales == SCALES
    sample.add([result(0.5)])
    assert sample.take(RAW_SCALES) is None


def test_nothing_is_told_where_nothing_was_verified() -> None:
    sample = OutcomeSample(3)
    for _ in range(2 * STEPS):
        sample.add([result()])
        assert sample.take(RAW_SCALES) is None


def test_of_longer_blocks_the_drafters_own_positions_are_told() -> None:
    sample = OutcomeSample(2)
    for _ in range(STEPS):
        sample.add([result(0.5, 0.4, 0.3, accepted=3)])
    got = sample.take(RAW_SCALES)
    assert got is not None
    assert got.confidences.shape == (STEPS, 2)
    assert set(got.verified.tolist()) == set(got.accepted.tolist()) == {2}


def test_each_block_is_as_likely_to_be_told_of() -> None:
    sample = OutcomeSample(1)
    told = np.zeros((STEPS, 8))
    for _ in range(500):
        for step in range(STEPS):
            sample.add([result((8 * step + i) / 1000) for i in range(8)])
        got = sample.take(RAW_SCALES)
        assert got is not None
        assert len(got.verified) == MOST_BLOCKS
        numbers = np.rint(got.confidences[:, 0] * 1000).astype(int)
        assert len(set(numbers.tolist())) == MOST_BLOCKS
        np.add.at(told.reshape(-1), numbers, 1)
    expected = 500 * MOST_BLOCKS / told.size
    # Each count is nearly binomial: of 128, none strays by five deviations.
    assert np.abs(told - expected).max() < 5 * np.sqrt(expected)
