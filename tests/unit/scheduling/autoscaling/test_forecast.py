"""Days that were seen are foreseen, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspark.scheduling.autoscaling.forecast import DailyForecast

DAY_S = 86400
FORECAST = DailyForecast(lead_s=1800.0)


def after(days: list[dict[int, float]], until_s: int = 0) -> dict[str, Any]:
    """State after days of needs by hour, 1 where nothing is said, seen every minute."""
    state: dict[str, Any] = {}
    end = len(days) * DAY_S + until_s
    for now in range(0, end, 60):
        day, hour = days[min(now // DAY_S, len(days) - 1)], now % DAY_S // 3600
        state = FORECAST.observe(float(now), day.get(hour, 1.0), state)
    return json.loads(json.dumps(state))


def test_nothing_is_known_before_it_was_seen() -> None:
    assert FORECAST.ahead(0.0, {}) == 0.0
    morning = after([{}], -DAY_S + 6 * 3600)
    assert FORECAST.ahead(7 * 3600.0, morning) == 0.0  # of later hours nothing is known
    assert FORECAST.ahead(DAY_S + 3600.0, morning) == 1.0


def test_a_peak_is_seen_ahead_by_the_lead_and_not_earlier() -> None:
    state = after([{12: 5.0}])
    assert FORECAST.ahead(DAY_S + 11.4 * 3600, state) == 1.0
    assert FORECAST.ahead(DAY_S + 11.5 * 3600, state) == 5.0
    assert FORECAST.ahead(DAY_S + 12.9 * 3600, state) == 5.0
    assert FORECAST.ahead(DAY_S + 13.0 * 3600, state) == 1.0


def test_it_looks_over_midnight() -> None:
    assert FORECAST.ahead(2 * DAY_S - 600.0, after([{0: 4.0}] * 2)) == pytest.approx(4.0)


def test_newer_days_count_for_more() -> None:
    noon = 3 * DAY_S + 12 * 3600.0
    faded = FORECAST.ahead(noon, after([{12: 5.0}, {}, {}]))
    risen = FORECAST.ahead(noon, after([{}, {}, {12: 5.0}]))
    assert 1.0 < risen < faded < 5.0
    assert FORECAST.ahead(noon, after([{12: 5.0}] * 3)) == pytest.approx(5.0)


def test_the_state_that_was_given_stays_as_it_was() -> None:
    state = after([{}], -60)
    before = json.dumps(state)
    FORECAST.observe(float(DAY_S), 9.0, state)
    assert json.dumps(state) == before
