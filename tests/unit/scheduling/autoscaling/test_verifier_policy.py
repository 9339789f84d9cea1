"""Verifiers follow what they carry: within bounds, without flapping, and before the daily peak."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.config import VerifierScaling
from dspark.scheduling.autoscaling.policies import Pool, VerifierPolicy
from dspark.scheduling.autoscaling.signals import VerifierSignals

SETTINGS = VerifierScaling(min_replicas=1, max_replicas=8)
CALM = VerifierSignals(0.3, 0.0, 1.0, 4.0, 0.0, 0.0)
SHARES = st.floats(0.0, 1.0)
REPORTS = st.builds(
    VerifierSignals, SHARES, st.floats(0.0, 60.0), SHARES, st.floats(0.0, 99.0), SHARES, SHARES
)
REPORT_S = 5.0  # between reports
START_S = 30.0  # until a new replica runs


class Verifiers:
    """A pool that carries a load, on a clock of its own.

    `load` is of time, in replicas that hold all their pages; what does not fit waits.
    """

    def __init__(
        self,
        settings: VerifierScaling,
        load: Callable[[float], float],
        noise: float = 0.0,
        step_s: float = 1.0,  # between decisions
    ) -> None:
        self.step_s = step_s
        self.policy = VerifierPolicy(settings)
        self.settings, self.load, self.noise = settings, load, noise
        self.random = random.Random(0)
        self.now, self.state = 0.0, {}  # type: float, dict[str, Any]
        self.target = settings.min_replicas
        self.starts: list[float] = []  # when those beyond the ready ones will be ready
        self.ready = settings.min_replicas
        self.age_s = 0.0
        self.readings: list[VerifierSignals | None] = []
        self.changes: list[tuple[float, int]] = []  # when, and by how many

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self._report()
            pool = Pool(self.target, self.settings.min_replicas, self.settings.max_replicas)
            decision = self.policy.decide(self.now, pool, self.readings, self.state)
            self.state = json.loads(json.dumps(decision.state))
            self._scale(decision.replicas)
            self.now += self.step_s

    def _report(self) -> None:
        while self.starts and self.starts[0] <= self.now:
            self.starts.pop(0)
            self.ready += 1
        each = self.load(self.now) / self.ready
        self.age_s = self.age_s + self.step_s if each > 1.0 else 0.0
        if self.now % REPORT_S and len(self.readings) == self.ready:
            return

        def held() -> float:
            return min(1.0, max(0.0, each + self.random.gauss(0.0, self.noise)))

        self.readings = [
            replace(CALM, kv_pressure=held(), queue_age_s=self.age_s) for _ in range(self.ready)
        ]

    def _scale(self, count: int) -> None:
        if count == self.target:
            return
        self.changes.append((self.now, count - self.target))
        if count > self.target:
            self.starts += [self.now + START_S] * (count - self.target)
        else:
            gone = self.target - count
            del self.starts[max(0, len(self.starts) - gone) :]
            self.ready = min(self.ready, count)
        self.target = count


@given(st.lists(st.none() | REPORTS, max_size=8), st.integers(0, 20), st.integers(1, 5))
def test_never_beyond_the_bounds(
    readings: list[VerifierSignals | None], target: int, least: int
) -> None:
    policy = VerifierPolicy(replace(SETTINGS, up_after_s=0.0, down_after_s=0.0))
    decision = policy.decide(0.0, Pool(target, least, least + 3), readings, {})
    assert least <= decision.replicas <= least + 3


@given(st.lists(REPORTS, min_size=1, max_size=5), REPORTS, st.integers(1, 8))
def test_more_pressure_never_means_fewer(
    readings: list[VerifierSignals], worse: VerifierSignals, target: int
) -> None:
    policy = VerifierPolicy(replace(SETTINGS, up_after_s=0.0, down_after_s=0.0))
    harder: list[VerifierSignals | None] = [
        replace(
            one,
            kv_pressure=max(one.kv_pressure, worse.kv_pressure),
            queue_age_s=max(one.queue_age_s, worse.queue_age_s),
            floor_attainment=min(one.floor_attainment, worse.floor_attainment),
        )
        for one in readings
    ]
    pool = Pool(target, 1, 8)
    easy = policy.decide(0.0, pool, readings, {}).replicas
    assert policy.decide(0.0, pool, harder, {}).replicas >= easy


@given(st.lists(st.none() | REPORTS, max_size=6), st.integers(1, 8), st.booleans())
def test_nothing_goes_while_a_report_is_missing(
    readings: list[VerifierSignals | None], target: int, forecasts: bool
) -> None:
    policy = VerifierPolicy(
        replace(SETTINGS, down_after_s=0.0, policy="forecast" if forecasts else "pressure")
    )
    idle = [replace(CALM, kv_pressure=0.0)] * target
    state: dict[str, Any] = {}
    for now in range(3):  # it was about to shrink
        state = VerifierPolicy(SETTINGS).decide(now, Pool(target, 1, 8), idle, state).state
    decision = policy.decide(1e4, Pool(target, 1, 8), [*readings, None], state)
    assert decision.replicas >= target
    assert policy.decide(2e4, Pool(target, 1, 8), [], decision.state).replicas >= target


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ({"kv_pressure": 1.0}, 3),  # 2 / 0.7
        ({"queue_age_s": 3.0}, 3),  # half as long again as it should be
        ({"queue_age_s": 500.0}, 4),  # not more than twice as many at a time
        ({"queue_age_s": 1.0}, 2),  # who waits, waits for room: nobody goes
        ({"floor_attainment": 0.7}, 3),
        ({"floor_attainment": 0.96}, 2),  # met, but only just
        ({}, 1),
    ],
)
def test_each_figure_counts(figures: dict[str, float], wanted: int) -> None:
    policy = VerifierPolicy(replace(SETTINGS, up_after_s=0.0, down_after_s=0.0))
    readings = [replace(CALM, **figures)] * 2
    assert policy.decide(0.0, Pool(2, 1, 8), readings, {}).replicas == wanted


def test_a_step_of_load_brings_verifiers_and_takes_them_again() -> None:
    pool = Verifiers(SETTINGS, lambda now: 3.0 if 60.0 <= now < 1000.0 else 0.2)
    pool.run(60.0)
    assert pool.target == 1
    pool.run(240.0)
    assert pool.target == 4  # 3 / 0.7, but for the deadband
    pool.run(700.0)
    assert pool.target == 4
    pool.run(700.0)
    assert pool.target == 1
    steps = [by > 0 for _, by in pool.changes]
    assert steps == sorted(steps, reverse=True), "it went down before it had gone up"


@pytest.mark.parametrize("tenths", range(2, 50, 3))
def test_no_flapping_over_ten_minutes_of_noise(tenths: int) -> None:
    pool = Verifiers(SETTINGS, lambda now: tenths / 10.0, noise=0.08)
    pool.run(900.0)  # up to what it takes
    pool.changes.clear()
    pool.run(600.0)
    assert len(pool.changes) <= 1, pool.changes
    assert pool.target >= min(8, round(tenths / 10.0))


def test_bursts_that_end_before_a_replica_would_have_come_bring_none() -> None:
    pool = Verifiers(SETTINGS, lambda now: 2.0 if now % 60.0 < 8.0 else 0.3)
    pool.run(600.0)
    assert pool.changes == []


def daily(now: float) -> float:
    return 3.0 if 12.0 <= now % 86400.0 / 3600.0 < 14.0 else 0.3


@pytest.mark.parametrize("policy", ["forecast", "pressure"])
def test_a_forecast_has_replicas_ready_before_a_daily_peak(policy: str) -> None:
    pool = Verifiers(replace(SETTINGS, policy=policy, lead_s=1800.0), daily, step_s=10.0)
    pool.run(2 * 86400.0 + 11.4 * 3600.0)
    assert pool.target == 1  # not a night too early
    pool.run(0.5 * 3600.0)  # six minutes before the peak
    assert (pool.ready >= 5) is (policy == "forecast")
    pool.run(3.0 * 3600.0)
    assert pool.target == 1  # and it goes when the peak is over
