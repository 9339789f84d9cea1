"""Figures of an operator, from records whose figures are known."""

from __future__ import annotations

import pytest

from dspark.evaluation.latency import Agreement, summarise
from dspark.evaluation.openai_client import Record

FINE = Agreement(ttft_ms=150.0, tpot_ms=20.0)


def record(sent_at: float, first: float, gap: float, events: int, per_event: int = 1) -> Record:
    times = tuple(sent_at + first + gap * i for i in range(events))
    return Record(sent_at, times, events * per_event)


def test_a_single_request() -> None:
    report = summarise([record(5.0, 0.1, 0.02, 11)], FINE)
    assert report.ttft_ms[0] == pytest.approx(100.0)
    assert report.tpot_ms[0] == pytest.approx(20.0)
    assert report.gap_ms == pytest.approx((20.0, 20.0, 20.0))
    assert report.user_tokens_per_s == pytest.approx(50.0)
    assert report.tokens_per_s == pytest.approx(11 / 0.3)
    assert report.failures == {}


def test_events_of_several_tokens_are_fast_tokens_in_slow_events() -> None:
    report = summarise([record(0.0, 0.1, 0.03, 10, per_event=3)], FINE)
    assert report.gap_ms[0] == pytest.approx(30.0)
    assert report.tpot_ms[0] == pytest.approx(9 * 30.0 / 29)


def test_the_load_running_out_does_not_count() -> None:
    """Two users, a request each second; what comes after the last was sent is left out."""
    records = [record(float(i), 0.1, 0.1, 19) for i in range(11)]
    assert summarise(records, FINE).tokens_per_s == pytest.approx(18.5, abs=1.0)


def test_failures_are_counted_by_reason_and_spoil_goodput() -> None:
    records = [
        record(0.0, 0.1, 0.01, 5),
        record(1.0, 0.2, 0.01, 5),  # first token too late
        record(2.0, 0.1, 0.05, 5),  # too slow
        Record(3.0, (), 0, "HTTP 429"),
        Record(4.0, (4.1,), 1, "broken off"),
    ]
    report = summarise(records, FINE)
    assert report.failures == {"HTTP 429": 1, "broken off": 1}
    assert report.good_share == pytest.approx(0.2)
    assert report.goodput_per_s == pytest.approx(1 / 4)
    assert report.requests == 5


def test_nothing_but_failures_is_reported_too() -> None:
    report = summarise([Record(0.0, (), 0, "ConnectError")], FINE)
    assert report.tokens_per_s == report.user_tokens_per_s == 0.0
    with pytest.raises(ValueError, match="no request"):
        summarise([], FINE)
