"""Calibration: what it finds, what it leaves alone, and what trimming does."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers.traffic import alike, traffic
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import CalibrationError
from dspark.scheduling.calibration import (
    CalibrationInUse,
    CalibrationTable,
    expected_calibration_error,
    fit_scale,
    scale_can_be,
    survival_error,
)
from dspark.scheduling.survival import survival
from dspark.types import RAW_SCALES, DoubleArray, IntArray, Scale, Scales

TRUE = (2.0, 0.7, 1.5, 1.0, 2.5)
SHIFT = (-0.4, 0.0, 0.5, 1.0, 0.2)
TABLE = CalibrationTable(
    Scales(Scale(TRUE, SHIFT), Scale((1.25,) * 5, (0.0,) * 5)), len(TRUE), "w", 4000
)


def trimmed(confidences: DoubleArray, least: float) -> IntArray:
    """As Algorithm 1 would under load: whatever promises less than `least` is not verified."""
    return np.asarray((survival(confidences.astype(np.float32)) >= least).sum(axis=1))


def test_a_known_scale_is_found_again() -> None:
    confidences, stood = traffic(30_000, TRUE, biases=SHIFT)
    found = fit_scale(confidences, np.full(len(stood), 5), stood)
    assert found.temperatures == pytest.approx(TRUE, rel=0.1)
    assert found.biases == pytest.approx(SHIFT, abs=0.15)


def test_trimming_by_confidence_does_not_bias_the_fit() -> None:
    confidences, stood = traffic(60_000, TRUE, biases=SHIFT)
    verified = trimmed(confidences, 0.3)
    assert 0 < (verified > 4).sum() < len(stood) / 2  # most are cut before the end
    hidden = np.where(np.arange(5) < verified[:, None], confidences, np.nan)
    found = fit_scale(hidden, verified, np.minimum(stood, verified))
    assert found.temperatures == pytest.approx(TRUE, rel=0.15)
    assert found.biases == pytest.approx(SHIFT, abs=0.2)


def test_survivals_are_true_after_the_fit_on_blocks_not_seen_by_it() -> None:
    confidences, stood = traffic(8_000, TRUE, seed=1, biases=SHIFT)
    whole, greedy = np.full(len(stood), 5), np.zeros(len(stood), dtype=np.bool_)
    found = fit_scale(confidences, whole, stood)
    unseen, fate = traffic(8_000, TRUE, seed=2, biases=SHIFT)
    wrong, right = RAW_SCALES, Scales(sampled=found)
    before, after = (survival_error(unseen, whole, fate, greedy, s) for s in (wrong, right))
    assert before > 0.05
    assert after < 0.02
    # What was found of one kind says nothing of the other.
    assert survival_error(unseen, whole, fate, ~greedy, right) == pytest.approx(before)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 300),
    st.integers(1, 3),
    st.floats(0.01, 100.0),
    st.floats(0.05, 20.0),
    st.floats(-8.0, 8.0),
)
def test_no_fit_foretells_worse_than_what_there_was(
    seed: int, count: int, size: int, spread: float, temperature: float, bias: float
) -> None:
    """Any confidences and fates: the likelihood given what came before does not fall."""
    rng = np.random.default_rng(seed)
    confidences = rng.beta(spread, 1.0, (count, size))
    verified = rng.integers(0, size + 1, count)
    accepted = rng.integers(0, verified + 1)
    previous = Scale((temperature,) * size, (bias,) * size)
    found = fit_scale(confidences, verified, accepted, previous)
    assert scale_can_be(found)
    for k in range(size):
        known = (verified > k) & (accepted >= k)
        chance = [
            survival(confidences[known, k : k + 1].astype(np.float64), Scale((t,), (b,)))[:, 0]
            for t, b in (
                (found.temperatures[k], found.biases[k]),
                (temperature, bias),
            )
        ]
        stood = accepted[known] > k
        clear = [np.clip(c.astype(np.float64), 1e-6, 1 - 1e-6) for c in chance]
        says = [np.log(np.where(stood, c, 1.0 - c)).sum() for c in clear]
        assert says[0] >= says[1] - 1e-3 * (1 + abs(says[1]))


@given(
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20, unique=True),
    st.floats(0.05, 20.0),
    st.floats(-8.0, 8.0),
)
def test_a_scale_keeps_the_order_of_a_position(
    row: list[float], temperature: float, bias: float
) -> None:
    column = np.sort(np.array(row, dtype=np.float32))[:, None]
    assert (np.diff(survival(column, Scale((temperature,), (bias,)))[:, 0]) >= 0).all()


def test_what_there_was_is_kept_as_far_as_little_evidence_says_otherwise() -> None:
    confidences, stood = traffic(30_000, TRUE)
    verified = np.where(np.arange(len(stood)) < 10, 3, 2)  # ten blocks tell of the third position
    old = Scale((9.0, 9.0, 3.0, 4.0), (0.0, 0.0, 1.0, 2.0))
    kept = fit_scale(confidences, verified, np.minimum(stood, verified), old)
    assert kept.temperatures[0] == pytest.approx(2.0, rel=0.1)
    assert (kept.temperatures[2], kept.biases[2]) == pytest.approx((3.0, 1.0), rel=0.3)
    assert (kept.temperatures[3:], kept.biases[3:]) == ((4.0, 1.0), (2.0, 0.0))


def test_nothing_is_fitted_to_nothing() -> None:
    assert fit_scale(np.zeros((0, 3)), [], []) == Scale((1.0,) * 3, (0.0,) * 3)
    assert survival_error(np.zeros((0, 3)), [], [], np.zeros(0, dtype=np.bool_)) == 0.0


@pytest.mark.parametrize(
    ("confidences", "verified", "accepted", "match"),
    [
        ([[0.5]], [1, 1], [0], "N lengths"),
        ([0.5], [1], [0], "N lengths"),
        ([[0.5]], [1], [2], "accepted"),
        ([[0.5]], [2], [0], "γ"),
        ([[0.5]], [1], [-1], "accepted"),
        ([[np.nan]], [1], [0], "0..1"),
        ([[1.5]], [1], [0], "0..1"),
    ],
)
def test_blocks_that_cannot_be_are_refused(
    confidences: list[list[float]], verified: list[int], accepted: list[int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        fit_scale(confidences, verified, accepted)


def test_the_error_is_the_gap_between_promise_and_outcome() -> None:
    observed = np.arange(1000) % 2 == 0
    constant = np.full(1000, 0.8)
    assert expected_calibration_error(constant, observed) == pytest.approx(0.3)
    assert expected_calibration_error(observed.astype(float), observed) == 0.0
    assert expected_calibration_error(1.0 - observed, observed) == 1.0
    # Too low in one half and too high in the other is no comfort.
    predicted = np.where(np.arange(1000) < 500, 0.4, 0.6)
    assert expected_calibration_error(predicted, observed) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="outcomes"):
        expected_calibration_error(np.zeros(0), np.zeros(0, dtype=bool))


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=50),
    st.randoms(use_true_random=False),
)
def test_the_error_is_a_share_and_knows_no_order(
    pairs: list[tuple[float, bool]], rng: random.Random
) -> None:
    def of(some: list[tuple[float, bool]]) -> float:
        return expected_calibration_error(
            np.array([p for p, _ in some]), np.array([o for _, o in some])
        )

    shuffled = [*pairs]
    rng.shuffle(shuffled)
    assert 0.0 <= of(pairs) <= 1.0
    assert of(shuffled) == pytest.approx(of(pairs))


def test_a_table_goes_through_text() -> None:
    assert CalibrationTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 10_000,
        "x" * 100_000,
        TABLE.to_json()[:-1],
        TABLE.to_json().replace("blocks", "block"),
        TABLE.to_json().replace("4000", "true"),
        TABLE.to_json().replace("4000", "-1"),
        TABLE.to_json().replace("4000", "1e9"),
        TABLE.to_json().replace("0.7", "NaN"),
        TABLE.to_json().replace("0.7", "Infinity"),
        TABLE.to_json().replace("0.7", "0.0"),
        TABLE.to_json().replace("0.7", '"0.7"'),
        TABLE.to_json().replace("0.7, ", ""),
        TABLE.to_json().replace("-0.4, ", ""),
        TABLE.to_json().replace("-0.4", "-8.5"),
        TABLE.to_json().replace("biases", "bias"),
        TABLE.to_json().replace("greedy", "other"),
        TABLE.to_json().replace("[1.25", "[[1.25]"),
        TABLE.to_json().replace('"w"', '""'),
        TABLE.to_json().replace('"w"', "7"),
    ],
)
def test_text_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError):
        CalibrationTable.from_json(text)


def test_a_table_of_another_drafter_does_not_fit() -> None:
    TABLE.check_fits(5, "w")
    for block_size, fingerprint in ((4, "w"), (5, "v")):
        with pytest.raises(CalibrationError, match="calibrate"):
            TABLE.check_fits(block_size, fingerprint)
    with pytest.raises(CalibrationError, match="sampled scale"):
        replace(TABLE, block_size=4)


def test_the_newest_table_that_fits_is_used(caplog: pytest.LogCaptureFixture) -> None:
    used = CalibrationInUse(5, "w")
    assert (used.scales, used.epoch) == (RAW_SCALES, 0)
    used.offer(replace(TABLE, epoch=2))
    used.offer(replace(TABLE, epoch=1, scales=alike((1.0,) * 5)))
    assert (used.scales, used.epoch, used.refused) == (TABLE.scales, 2, 0)
    for bad in (
        replace(TABLE, epoch=3, drafter_fingerprint="v"),
        CalibrationTable(alike((9.0,) * 4), 4, "w", 4000, epoch=3),
    ):
        used.offer(bad)
        used.offer(bad)
    assert (used.scales, used.epoch, used.refused) == (TABLE.scales, 2, 4)
    assert len(caplog.records) == 1
    assert "fingerprint 'v'" in caplog.text
