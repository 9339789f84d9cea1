"""Reports are read as they are, and what is absent is absent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from dspark.scheduling.autoscaling.signals import (
    DraftSignals,
    Share,
    VerifierSignals,
    read,
    to_stats,
)

FIGURES = VerifierSignals(0.5, 2.0, 1.0, 3.0, 0.25, 0.0)


@dataclass(frozen=True)
class Sample:
    timestamp: float
    value: float


def samples(at: float, **changed: list[float]) -> dict[str, dict[str, list[Sample]]]:
    """One replica's, named a."""
    values = {name: [value] for name, value in to_stats(FIGURES).items()} | changed
    return {name: {"a": [Sample(at, v) for v in series]} for name, series in values.items()}


def test_what_is_reported_is_what_is_read() -> None:
    assert read(VerifierSignals, samples(90.0), ["a"], 100.0, 30.0) == [FIGURES]
    assert all(type(value) is float for value in to_stats(FIGURES).values())


def test_a_figure_is_the_mean_of_its_samples() -> None:
    (reading,) = read(VerifierSignals, samples(90.0, kv_pressure=[0.2, 0.4]), ["a"], 100.0, 30.0)
    assert reading is not None
    assert reading.kv_pressure == pytest.approx(0.3)


def test_an_unknown_replica_reports_nothing() -> None:
    readings = read(VerifierSignals, samples(90.0), ["a", "b"], 100.0, 30.0)
    assert readings == [FIGURES, None]
    assert read(VerifierSignals, {}, ["a"], 100.0, 30.0) == [None]


@pytest.mark.parametrize("series", [[], [math.nan], [math.inf], [-1.0]])
def test_an_empty_or_senseless_figure_is_no_report(series: list[float]) -> None:
    assert read(VerifierSignals, samples(90.0, requests=series), ["a"], 100.0, 30.0) == [None]


def test_an_old_report_is_none() -> None:
    assert read(VerifierSignals, samples(69.9), ["a"], 100.0, 30.0) == [None]
    assert read(DraftSignals, {"busy": {"a": [Sample(69.9, 0.1)]}}, ["a"], 100.0, 30.0) == [None]


def test_a_share_is_of_what_was_added() -> None:
    share = Share()
    assert share.look(1, 4) == 0.25
    assert share.look(1, 4) == 0.0  # nothing new
    assert share.look(4, 8) == 0.75
