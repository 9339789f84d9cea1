"""Sequential temperature scaling: what it finds, what it leaves alone, and what trimming does."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers.traffic import traffic
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import CalibrationError
from dspark.scheduling.calibration import (
    LEAST_SAMPLES,
    CalibrationInUse,
    CalibrationTable,
    expected_calibration_error,
    fit_temperatures,
    survival_error,
)
from dspark.scheduling.survival import survival
from dspark.types import DoubleArray, IntArray

GRID_STEP = 2 ** (1 / 8)
TRUE = (2.0, 0.7, 1.5, 1.0, 2.5)
TABLE = CalibrationTable(TRUE, len(TRUE), "w", 4000)


def trimmed(confidences: DoubleArray, least: float) -> IntArray:
    """As Algorithm 1 would under load: whatever promises less than `least` is not verified."""
    return np.asarray((survival(confidences.astype(np.float32)) >= least).sum(axis=1))


def test_known_temperatures_are_found_again() -> None:
    confidences, stood = traffic(30_000, TRUE)
    found = fit_temperatures(confidences, np.full(len(stood), 5), stood)
    assert np.abs(np.log(np.array(found) / TRUE)).max() <= 2 * np.log(GRID_STEP) + 1e-9


def test_trimming_by_confidence_does_not_bias_the_fit() -> None:
    confidences, stood = traffic(60_000, TRUE)
    verified = trimmed(confidences, 0.3)
    assert 0 < (verified > 4).sum() < len(stood) / 2  # most are cut before the end
    hidden = np.where(np.arange(5) < verified[:, None], confidences, np.nan)
    found = fit_temperatures(hidden, verified, np.minimum(stood, verified))
    assert np.abs(np.log(np.array(found) / TRUE)).max() <= 3 * np.log(GRID_STEP) + 1e-9


def test_survivals_are_true_after_the_fit_on_blocks_not_seen_by_it() -> None:
    confidences, stood = traffic(8_000, TRUE, seed=1)
    whole = np.full(len(stood), 5)
    found = fit_temperatures(confidences, whole, stood)
    unseen, fate = traffic(8_000, TRUE, seed=2)
    before, after = (survival_error(unseen, whole, fate, t) for t in ((), found))
    assert before > 0.05
    assert after < 0.02


@given(
    st.integers(0, 2**32 - 1),
    st.integers(LEAST_SAMPLES, 2 * LEAST_SAMPLES),
    st.integers(1, 3),
    st.floats(0.1, 10.0),
)
def test_no_position_is_left_worse_than_it_was(
    seed: int, count: int, size: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    confidences = rng.beta(spread, 1.0, (count, size))
    verified = rng.integers(0, size + 1, count)
    verified[:LEAST_SAMPLES] = size
    accepted = rng.integers(0, verified + 1)
    found = fit_temperatures(confidences, verified, accepted)
    for k in range(size):
        known = verified > k
        error = [
            expected_calibration_error(
                survival(confidences[known, : k + 1].astype(np.float32), (*found[:k], own))[:, k],
                accepted[known] > k,
            )
            for own in (found[k], 1.0)
        ]
        assert error[0] <= error[1] + 1e-4  # float32


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20, unique=True), st.floats(0.05, 20.0))
def test_a_temperature_keeps_the_order_of_a_position(row: list[float], temperature: float) -> None:
    column = np.sort(np.array(row, dtype=np.float32))[:, None]
    assert (np.diff(survival(column, (temperature,))[:, 0]) >= 0).all()


def test_positions_without_evidence_keep_what_they_had() -> None:
    confidences, stood = traffic(30_000, TRUE)
    verified = np.where(np.arange(len(stood)) < LEAST_SAMPLES - 1, 5, 2)
    accepted = np.minimum(stood, verified)
    assert fit_temperatures(confidences, verified, accepted)[2:] == (1.0, 1.0, 1.0)
    kept = fit_temperatures(confidences, verified, accepted, (9.0, 9.0, 3.0, 4.0))
    assert kept[2:] == (3.0, 4.0, 1.0)
    assert kept[0] == pytest.approx(2.0, rel=0.1)


def test_nothing_is_fitted_to_nothing() -> None:
    assert fit_temperatures(np.zeros((0, 3)), [], []) == (1.0, 1.0, 1.0)
    assert survival_error(np.zeros((0, 3)), [], []) == 0.0


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
        fit_temperatures(confidences, verified, accepted)


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
    with pytest.raises(CalibrationError, match="temperatures"):
        replace(TABLE, block_size=4)


def test_the_newest_table_that_fits_is_used(caplog: pytest.LogCaptureFixture) -> None:
    used = CalibrationInUse(5, "w")
    assert (used.temperatures, used.epoch) == ((), 0)
    used.offer(replace(TABLE, epoch=2))
    used.offer(replace(TABLE, epoch=1, temperatures=(1.0,) * 5))
    assert (used.temperatures, used.epoch, used.refused) == (TRUE, 2, 0)
    for bad in (
        replace(TABLE, epoch=3, drafter_fingerprint="v"),
        CalibrationTable((9.0,) * 4, 4, "w", 4000, epoch=3),
    ):
        used.offer(bad)
        used.offer(bad)
    assert (used.temperatures, used.epoch, used.refused) == (TRUE, 2, 4)
    assert len(caplog.records) == 1
    assert "fingerprint 'v'" in caplog.text
