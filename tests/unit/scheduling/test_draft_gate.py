"""Drafting pauses where it loses and comes back where it pays."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable

GOOD = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
BAD = np.array([0.2, 0.05, 0.01, 0.0], dtype=np.float32)
# 10 ms for the weights, and 1 ms a row
TABLE = StepTimeTable((1, 32), (1, 5), ((11.0, 15.0), (42.0, 170.0)))


class Verifier:
    """Plays rounds whose times are the table's, but for a factor and what drafting takes."""

    def __init__(self, draft_ms: float = 2.0, slower: float = 1.0) -> None:
        self.times = RoundTimes(TABLE)
        self.gate = DraftGate(self.times)
        self.draft_ms, self.slower = draft_ms, slower

    def rounds(self, block: np.ndarray, count: int, requests: int = 1) -> int:
        """How many of `count` were drafted for."""
        drafted = 0
        for _ in range(count):
            asked = self.gate.open(requests)
            drafted += asked
            tokens = requests
            if asked:
                self.gate.record([block] * requests)
                tokens = requests + 2
            step_ms = self.slower * TABLE.ms(requests, tokens)
            self.times.record(
                requests=requests,
                tokens=tokens,
                drafted=asked,
                step_ms=step_ms,
                round_ms=step_ms + 0.5 + self.draft_ms * asked,
            )
        return drafted


def test_it_stays_open_while_drafting_pays() -> None:
    assert Verifier().rounds(GOOD, 500) == 500


def test_while_drafting_loses_it_costs_a_small_share_of_the_time() -> None:
    verifier = Verifier(draft_ms=5.0)
    assert verifier.rounds(BAD, 100) < 25
    verifier.rounds(BAD, 2000)
    assert verifier.rounds(BAD, 5000) * 5.0 < 0.005 * 5000 * 11.5


def test_it_opens_again_when_texts_become_predictable() -> None:
    verifier = Verifier()
    verifier.rounds(BAD, 500)
    verifier.rounds(GOOD, 5000)
    assert verifier.rounds(GOOD, 100) == 100


def test_what_loses_under_load_is_known_to_pay_without() -> None:
    verifier = Verifier(draft_ms=12.0)
    fair = np.array([0.6, 0.4, 0.2, 0.1], dtype=np.float32)
    verifier.rounds(fair, 10, requests=16)
    assert verifier.rounds(fair, 100, requests=16) < 12
    verifier.draft_ms = 1.0
    assert verifier.rounds(fair, 100, requests=1) == 100
    assert verifier.rounds(fair, 50, requests=16) < 12  # and it remembers


def test_slow_rounds_after_a_start_are_forgotten() -> None:
    verifier = Verifier(draft_ms=60.0)
    verifier.rounds(GOOD, 20)
    verifier.draft_ms = 2.0
    verifier.rounds(GOOD, 100)
    assert verifier.rounds(GOOD, 100) == 100


def test_one_slow_round_changes_nothing() -> None:
    verifier = Verifier()
    verifier.draft_ms = 500.0
    verifier.rounds(GOOD, 1)
    verifier.draft_ms = 2.0
    assert verifier.rounds(GOOD, 300) == 300


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_times_follow_what_is_measured(slower: float) -> None:
    verifier = Verifier(slower=slower)
    verifier.rounds(GOOD, 20, requests=4)
    verifier.times.record(requests=4, tokens=4, drafted=False, step_ms=7.0, round_ms=7.2)
    assert verifier.times.step_ms(4, 6) == pytest.approx(slower * TABLE.ms(4, 6))
    assert verifier.times.step_ms(4, 4) == pytest.approx(7.0)
    assert verifier.times.draft_ms(4) == pytest.approx(2.5)
    assert verifier.times.plain_ms(4) == pytest.approx(7.2)
    assert not verifier.times.drafting_known(16)
    assert verifier.times.step_ms(16, 20) == TABLE.ms(16, 20)


def test_the_gain_is_that_of_the_plans() -> None:
    verifier = Verifier(draft_ms=0.0)
    verifier.gate.record([GOOD])
    # 11 ms and 1 ms more for each draft token: all four are worth it
    tokens = 1 + float(GOOD.sum())
    assert verifier.gate.gain(1) == pytest.approx(tokens / 15.0 * 11.0, rel=1e-5)
