"""Drafts follow their verifiers: in a ratio, to none while they do not pay, and back."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.config import DraftScaling
from dspark.scheduling.autoscaling.policies import DraftPolicy, Pool, VerifierView
from dspark.scheduling.autoscaling.signals import DraftSignals, VerifierSignals

STALE_S = 30.0
SETTINGS = DraftScaling(max_replicas=8, min_ratio=0.25, max_ratio=1.0)
AT_ONCE = replace(SETTINGS, up_after_s=0.0, down_after_s=0.0, wake_after_s=0.0, zero_after_s=0.0)
SHARES = st.floats(0.0, 1.0)
READINGS = st.lists(st.none() | st.builds(DraftSignals, SHARES), max_size=6)
VIEWS = st.none() | st.builds(
    VerifierView,
    at=st.floats(-100.0, 0.0),
    replicas=st.integers(1, 12),
    complete=st.booleans(),
    requests=st.floats(0.0, 99.0),
    wanted=SHARES,
    missed=SHARES,
)


def view(now: float, **figures: Any) -> VerifierView:
    settings = {"replicas": 4, "complete": True, "requests": 8.0, "wanted": 1.0, **figures}
    return VerifierView(at=now, **settings)


class Drafts:
    """A pool that its verifiers use, on a clock of its own."""

    def __init__(self, settings: DraftScaling = SETTINGS, target: int = 0) -> None:
        self.policy, self.settings = DraftPolicy(settings, STALE_S), settings
        self.now, self.target = 0.0, target
        self.state: dict[str, Any] = {}
        self.counts: list[int] = []

    def run(self, seconds: float, busy: float | None = 0.5, **figures: Any) -> int:
        """The count after so long; `busy` is of each, None if they do not say."""
        reading = None if busy is None else DraftSignals(busy)
        for _ in range(round(seconds)):
            pool = Pool(self.target, self.settings.min_replicas, self.settings.max_replicas)
            decision = self.policy.decide(
                self.now, pool, [reading] * self.target, view(self.now, **figures), self.state
            )
            self.state = json.loads(json.dumps(decision.state))
            self.target = decision.replicas
            self.counts.append(self.target)
            self.now += 1.0
        return self.target

    def hear_nothing(self, seconds: float) -> int:
        last, self.now = view(self.now), self.now + STALE_S + 1.0
        for _ in range(round(seconds)):
            pool = Pool(self.target, self.settings.min_replicas, self.settings.max_replicas)
            decision = self.policy.decide(self.now, pool, [], last, self.state)
            self.state, self.target = decision.state, decision.replicas
            self.now += 1.0
        return self.target


@given(READINGS, VIEWS, st.integers(0, 12), st.integers(0, 3))
def test_never_beyond_the_bounds(
    readings: list[DraftSignals | None], verifiers: VerifierView | None, target: int, least: int
) -> None:
    pool = Pool(target, least, least + 3)
    decision = DraftPolicy(AT_ONCE, STALE_S).decide(0.0, pool, readings, verifiers, {})
    assert least <= decision.replicas <= least + 3


@given(READINGS, VIEWS, st.integers(1, 8), st.booleans())
def test_nothing_goes_while_a_report_is_missing(
    readings: list[DraftSignals | None],
    verifiers: VerifierView | None,
    target: int,
    wanted: bool,
) -> None:
    if verifiers is not None:
        verifiers = replace(verifiers, complete=False)
    state = {"demand": {"wanted": wanted, "changed": -1e6, "pending": -1e6}}
    policy = DraftPolicy(AT_ONCE, STALE_S)
    pool = Pool(target, 0, 8)
    assert policy.decide(0.0, pool, readings, verifiers, state).replicas >= target
    # of draft replicas that do not say how busy they are, none goes for want of work
    silent = policy.decide(0.0, pool, [*readings, None], view(0.0, replicas=8), {})
    assert silent.replicas >= target


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.2), st.integers(1, 8))
def test_busier_never_means_fewer(one: float, other: float, missed: float, target: int) -> None:
    policy, pool = DraftPolicy(AT_ONCE, STALE_S), Pool(target, 0, 8)
    less, more = (
        policy.decide(0.0, pool, [DraftSignals(busy)] * target, view(0.0, missed=missed), {})
        for busy in sorted((one, other))
    )
    assert more.replicas >= less.replicas


@pytest.mark.parametrize("verifiers", range(1, 9))
@pytest.mark.parametrize("busy", [0.0, 0.5, 1.0])
def test_wanted_drafts_keep_their_ratio(verifiers: int, busy: float) -> None:
    count = Drafts(AT_ONCE, target=2).run(20, busy, replicas=verifiers)
    assert max(1, verifiers * 0.25) <= count <= max(1, verifiers)


def test_busy_drafts_get_company_and_idle_ones_lose_it() -> None:
    drafts = Drafts(target=1)
    assert drafts.run(20, busy=1.0) == 2
    assert drafts.run(20, busy=1.0) == 4  # as many as verifiers, and no more
    assert drafts.run(60, busy=1.0) == 4
    assert drafts.run(310, busy=0.05) == 1


def test_missed_deadlines_bring_more() -> None:
    assert Drafts(target=2).run(20, busy=0.3, missed=0.2) == 4
    assert Drafts(target=2).run(400, busy=0.1, missed=0.03) == 2  # too near the limit to go


def test_to_none_when_they_do_not_pay_and_back_when_they_do() -> None:
    drafts = Drafts(target=2)
    assert drafts.run(299, wanted=0.1) == 2
    assert drafts.run(10, wanted=0.1) == 0
    assert drafts.run(600, wanted=0.1) == 0
    assert drafts.run(4, wanted=0.8) == 0
    assert drafts.run(2, wanted=0.8) == 1  # a quarter of four verifiers


def test_no_flapping_over_ten_minutes_of_noise() -> None:
    noise, drafts = random.Random(0), Drafts(target=2)
    for _ in range(120):  # reports, five seconds apart
        busy = min(1.0, max(0.0, noise.gauss(0.55, 0.1)))
        drafts.run(5, busy, wanted=noise.choice([0.0, 0.3, 1.0]), missed=noise.uniform(0.0, 0.05))
    assert set(drafts.counts) == {2}


def test_a_flicker_of_demand_wakes_nobody() -> None:
    drafts = Drafts()
    for _ in range(60):
        drafts.run(4, wanted=1.0)
        drafts.run(6, wanted=0.0)
    assert set(drafts.counts) == {0}


def test_after_long_without_drafts_it_looks_again() -> None:
    drafts = Drafts(replace(SETTINGS, retry_after_s=1000.0))
    assert drafts.run(999, wanted=0.0) == 0
    assert drafts.run(3, wanted=0.0) == 1
    assert drafts.run(310, busy=0.0, wanted=0.0) == 0
    assert drafts.run(3000, wanted=0.0, requests=0.0) == 0  # nobody to look for
    never = Drafts(replace(SETTINGS, retry_after_s=0.0))
    assert never.run(5000, wanted=0.0) == 0


def test_without_word_from_verifiers_all_stays_and_no_delay_goes_on() -> None:
    drafts = Drafts(target=2)
    assert drafts.run(290, wanted=0.0) == 2
    assert drafts.hear_nothing(1000) == 2
    assert drafts.run(290, wanted=0.0) == 2
    assert drafts.run(20, wanted=0.0) == 0


def test_a_view_is_of_the_verifiers_that_report() -> None:
    calm = VerifierSignals(0.1, 0.0, 1.0, 2.0, 0.0, 0.0)
    keen = replace(calm, drafts_wanted=0.9, blocks_missed=0.1)
    seen = VerifierView.of(5.0, 3, [calm, keen])
    assert seen == VerifierView(5.0, 3, True, requests=4.0, wanted=0.9, missed=0.1)
    assert not VerifierView.of(5.0, 3, [calm, None]).complete
    assert not VerifierView.of(5.0, 3, []).complete
