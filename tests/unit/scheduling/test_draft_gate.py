"""Drafting pauses where it loses and comes back where it pays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers.tables import flat_table

from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable

GOOD = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
BAD = np.array([0.2, 0.05, 0.01, 0.0], dtype=np.float32)
# 10 ms for the weights, and 1 ms a row
TABLE = flat_table((1, 32), (1, 5), ((11.0, 15.0), (42.0, 170.0)))


MOST = len(GOOD)


class Verifier:
    """Plays rounds whose times are the table's, but for a factor and what drafting takes.

    A block of one token takes 0.6 of the time of a whole one. Drafting for a few of many requests
    takes as much less. So many tokens of prompts take part in every step, at 1 ms each.
    """

    def __init__(
        self,
        draft_ms: float = 2.0,
        slower: float = 1.0,
        *,
        prefill: int = 0,
        reading: int = 0,  # of the requests, those that are at their prompts
        believed: StepTimeTable = TABLE,
        few_ms: float | None = None,  # that drafting for a few takes; None: in proportion
    ) -> None:
        self.times = RoundTimes(believed)
        self.gate = DraftGate(self.times)
        self.draft_ms, self.slower, self.prefill = draft_ms, slower, prefill
        self.reading, self.few_ms = reading, few_ms
        self.sizes: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()  # requests drafted for
        self.drafting_ms = 0.0

    def rounds(self, block: np.ndarray, count: int, requests: int = 1) -> int:
        """How many of `count` were drafted for."""
        self.sizes.clear()
        self.widths.clear()
        for _ in range(count):
            size = self.gate.block_size(requests, MOST)
            self.sizes[size] += 1
            tokens, drafting_ms = requests, 0.0
            width = self.gate.width or requests
            if size:
                self.widths[width] += 1
                self.gate.record([block[:size]] * width)
                tokens += min(size, 2)
                drafting_ms = self.draft_ms * (0.467 + 0.533 * size / MOST) * width / requests
                if self.few_ms is not None and width < requests:
                    drafting_ms = self.few_ms
            self.drafting_ms += drafting_ms
            step_ms = self.slower * TABLE.ms(requests, tokens, 0)
            if size and width < requests:
                if self.few_ms is not None:
                    self.times.record_few(requests, 0.5 + drafting_ms)
                continue
            self.times.record(
                requests=requests - self.reading,
                tokens=tokens + self.prefill - self.reading,
                drafted=size,
                step_ms=step_ms + self.prefill,
                round_ms=step_ms + self.prefill + 0.5 + drafting_ms,
                prefill=self.prefill,
            )
        return count - self.sizes[0]

    def knows_plain(self, requests: int) -> bool:
        """Whether rounds without drafts have been timed at this load."""
        return self.times._at(requests).usual_plain_ms is not None


def growth(few: int, many: int) -> float:
    """Of the longest steps, from so many requests to so many."""
    rows = TABLE.rows[-1]
    return TABLE.ms(many, many * rows, 0) / TABLE.ms(few, few * rows, 0)


@pytest.mark.parametrize("requests", [1, 2, 3, 5])
def test_it_stays_open_while_drafting_pays(requests: int) -> None:
    assert Verifier().rounds(GOOD, 500, requests) > 0.95 * 500


def test_while_drafting_loses_it_costs_a_small_share_of_the_time() -> None:
    verifier = Verifier(draft_ms=5.0)
    assert verifier.rounds(BAD, 100) < 25
    verifier.rounds(BAD, 2000)
    assert verifier.rounds(BAD, 5000) * 5.0 < 0.005 * 5000 * 11.5


def test_under_a_heavy_load_it_hardly_costs_anything_from_the_first_round() -> None:
    """Probes draft for a few requests: drafting for all would lose whatever texts are like."""
    verifier = Verifier(draft_ms=30.0)
    verifier.rounds(BAD, 6, requests=32)
    verifier.drafting_ms = 0.0
    verifier.rounds(BAD, 100, requests=32)
    assert verifier.widths[4] >= 6
    assert verifier.widths[32] == 0
    assert verifier.drafting_ms < 0.01 * 100 * 43.0
    verifier.rounds(BAD, 5000, requests=32)
    verifier.drafting_ms = 0.0
    verifier.rounds(BAD, 5000, requests=32)
    assert verifier.drafting_ms < 0.005 * 5000 * 43.0


def test_what_drafting_for_a_few_takes_is_measured_and_kept_to_its_share() -> None:
    """A GPU drafts for four in the time that it takes for many more."""
    verifier = Verifier(draft_ms=60.0, few_ms=20.0)
    verifier.rounds(BAD, 3000, requests=32)
    verifier.drafting_ms = 0.0
    verifier.rounds(BAD, 6000, requests=32)
    assert 0 < verifier.widths[4] < 0.02 * 6000
    assert verifier.drafting_ms < 0.008 * 6000 * 42.5


def test_a_few_requests_show_that_drafting_pays_for_all() -> None:
    verifier = Verifier(draft_ms=30.0)
    verifier.rounds(BAD, 500, requests=32)
    verifier.rounds(np.ones(4, dtype=np.float32), 5000, requests=32)
    assert verifier.rounds(np.ones(4, dtype=np.float32), 100, requests=32) > 90
    assert verifier.widths[32] > 90


def test_what_drafting_for_all_takes_is_measured_again_however_hopeless_it_looked() -> None:
    """A few requests cannot show that rounds with blocks for all are faster than they were."""
    verifier = Verifier(draft_ms=150.0)
    sure = np.ones(4, dtype=np.float32)
    verifier.rounds(sure, 3000, requests=32)
    assert verifier.widths[32] < 0.01 * 3000
    verifier.draft_ms = 2.0
    verifier.rounds(sure, 14000, requests=32)
    assert verifier.rounds(sure, 100, requests=32) > 90


def test_what_a_loads_first_rounds_took_is_soon_put_to_the_test() -> None:
    """Kernels are loaded in them, and everybody's prompt is read."""
    verifier = Verifier(draft_ms=150.0)
    sure = np.ones(4, dtype=np.float32)
    verifier.rounds(sure, 6, requests=32)
    verifier.draft_ms = 2.0
    verifier.rounds(sure, 450, requests=32)
    assert verifier.rounds(sure, 100, requests=32) > 90


def test_what_drafting_takes_is_timed_at_a_load_before_it_is_given_up() -> None:
    """Times of a smaller load, grown as steps grow, make drafting look dearer than it may be."""
    verifier = Verifier(draft_ms=30.0)
    verifier.rounds(BAD, 40, requests=4)
    verifier.draft_ms = 40.0
    assert verifier.times.draft_ms(32, MOST) == pytest.approx(30 * growth(4, 32), rel=0.1)
    verifier.rounds(BAD, 400, requests=32)
    assert set(verifier.widths) == {4, 32}
    assert verifier.times.draft_ms(32, MOST) < 45


def test_times_are_learnt_while_prompts_keep_coming() -> None:
    """Under steady traffic hardly a step is without one."""
    verifier = Verifier(draft_ms=30.0, prefill=40)
    verifier.rounds(BAD, 6, requests=32)
    assert verifier.times.drafting_known
    assert verifier.times.draft_ms(32, MOST) == pytest.approx(30.5)
    assert verifier.times.step_ms(32, 32) == pytest.approx(TABLE.ms(32, 32, 0)), "prompts compared"
    verifier.rounds(BAD, 100, requests=32)
    assert verifier.widths[32] == 0


def test_it_says_how_long_no_blocks_will_be_asked_for() -> None:
    """So that drafters get their context in time, and not before."""
    verifier = Verifier(draft_ms=5.0)
    verifier.rounds(BAD, 2000)
    while not verifier.gate.rest:
        verifier.rounds(BAD, 1)
    assert verifier.rounds(BAD, verifier.gate.rest) == 0
    assert verifier.gate.rest == 0
    assert verifier.rounds(BAD, 1) == 1


def test_it_opens_again_when_texts_become_predictable() -> None:
    verifier = Verifier()
    verifier.rounds(BAD, 500)
    verifier.rounds(GOOD, 5000)
    assert verifier.rounds(GOOD, 100) > 90


def test_what_loses_under_load_is_known_to_pay_without() -> None:
    verifier = Verifier(draft_ms=12.0)
    fair = np.array([0.6, 0.4, 0.2, 0.1], dtype=np.float32)
    verifier.rounds(fair, 10, requests=16)
    assert verifier.rounds(fair, 100, requests=16) < 12
    verifier.draft_ms = 1.0
    assert verifier.rounds(fair, 100, requests=1) > 90
    assert verifier.rounds(fair, 50, requests=16) < 12  # and it remembers


def test_a_load_that_was_never_seen_is_judged_by_its_neighbours() -> None:
    verifier = Verifier()
    for requests in (1, 2, 8):
        verifier.draft_ms = 4.0 * requests
        verifier.rounds(BAD, 40, requests)
    at = {requests: verifier.times.draft_ms(requests, MOST) for requests in (2, 4, 8, 16)}
    assert at[4] == pytest.approx(at[2] + (at[8] - at[2]) / 3)
    assert at[16] == pytest.approx(growth(8, 16) * at[8])
    assert verifier.rounds(BAD, 16, requests=16) == 0, "what cannot pay must not be tried"


def test_no_block_is_thought_to_take_longer_than_a_longer_one() -> None:
    """As after a moment in which the host was busy with other things."""
    times = RoundTimes(TABLE)
    for drafted, took_ms in ((1, 2.0), (2, 9.0), (4, 5.0)):
        for _ in range(6):
            times.record(requests=1, tokens=1, drafted=drafted, step_ms=1.0, round_ms=1.0 + took_ms)
    at = [times.draft_ms(1, size) for size in (1, 2, 3, 4)]
    assert at == sorted(at)
    assert at[1] == at[3] == pytest.approx(times.draft_ms(1, 1) * 5.0 / 2.0)


def test_plain_rounds_are_not_thought_dear_for_what_few_requests_saw() -> None:
    """As when many users come at once: the first rounds, of few, do much beside their step."""
    times = RoundTimes(TABLE)
    for _ in range(5):
        times.record(requests=1, tokens=1, drafted=0, step_ms=1.0, round_ms=11.0)
        times.record(requests=1, tokens=3, drafted=7, step_ms=1.5, round_ms=11.5)
    assert times.plain_ms(16) <= times.step_ms(16, 16) + 10.0 * (1.0 + 1e-6)


def test_rounds_without_are_looked_at_soon_at_a_new_load() -> None:
    """They are half of what is compared, and were a guess until then."""
    verifier = Verifier()
    for requests in (1, 4, 16):
        assert verifier.rounds(GOOD, 16, requests) <= 12
        assert verifier.knows_plain(requests)
        assert verifier.rounds(GOOD, 300, requests) >= 290  # and again, but more and more rarely


def test_rounds_without_send_no_context_ahead() -> None:
    """Plain decoding would not, and it is plain decoding that they stand for."""
    verifier = Verifier()
    rests = set()
    for _ in range(100):
        drafted = verifier.rounds(GOOD, 1)
        rests.add((drafted, min(verifier.gate.rest, 100)))
    assert rests == {(1, 0), (0, 100)}


def test_drafting_is_timed_soon_where_it_pays_if_it_takes_no_longer() -> None:
    """As on a GPU, which drafts for sixteen in the time that it takes for one."""
    verifier = Verifier(draft_ms=8.0)
    verifier.rounds(GOOD, 100, requests=1)
    assert verifier.gate.gain(16, MOST) < 0.9 < 1.0 < verifier.gate.gain(16, MOST, grows=False)
    verifier.rounds(GOOD, 12, requests=16)
    assert verifier.widths == {16: 4}
    assert verifier.times.knows_drafting(16)


def test_a_load_whose_rounds_are_counted_as_anothers_is_looked_at_once() -> None:
    """A long prompt beside eight who decode makes nine; what is timed is eight."""
    verifier = Verifier(reading=1)
    assert verifier.rounds(GOOD, 300, requests=9) > 0.9 * 300
    assert not verifier.knows_plain(9)


def test_a_length_is_judged_again_as_soon_as_it_has_been_timed() -> None:
    """Short blocks are thought cheap until they are; an estimate is due after 32 rounds only."""
    verifier = Verifier(draft_ms=6.0)
    fair = np.array([0.55, 0.1, 0.02, 0.0], dtype=np.float32)
    verifier.rounds(fair, 4)
    assert verifier.gate.usual_size == 1
    assert not verifier.times.knows_length(1, 1), "a guess has to be what opens it"
    verifier.draft_ms = 12.0
    verifier.rounds(fair, 5)
    assert verifier.gate.usual_size == 0


@pytest.mark.parametrize("block", [GOOD, BAD])
def test_an_estimate_that_was_made_in_time_is_the_one_that_counts(
    block: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier makes it while a GPU is at a step, and must not wait for another after it."""
    ahead, behind = Verifier(draft_ms=5.0), Verifier(draft_ms=5.0)
    made: list[DraftGate] = []
    compare = DraftGate._compare

    def counted(gate: DraftGate, *how: Any) -> None:
        made.append(gate)
        compare(gate, *how)

    monkeypatch.setattr(DraftGate, "_compare", counted)
    for _ in range(200):
        if due := ahead.gate.due(1):
            ahead.gate.estimate(1, MOST)
        assert not ahead.gate.due(1)
        before = len(made)
        ahead.rounds(block, 1)
        assert len(made) == before, "it was made in time"
        behind.rounds(block, 1)
        assert (len(made) > before) is due, "it would have been made now"
        assert ahead.sizes == behind.sizes


def test_pauses_at_one_load_outlast_a_stay_at_another() -> None:
    verifier = Verifier(draft_ms=20.0)
    verifier.rounds(BAD, 2000, requests=16)
    verifier.draft_ms = 0.5
    verifier.rounds(GOOD, 20, requests=1)  # with its first look at rounds without
    spent = 0
    for _ in range(20):
        verifier.draft_ms = 0.5
        assert verifier.rounds(GOOD, 20, requests=1) >= 18
        verifier.draft_ms = 20.0
        spent += verifier.rounds(BAD, 20, requests=16)
    assert spent < 20


def test_blocks_of_which_nothing_is_verified_never_pay() -> None:
    """Rounds with them were timed at moments a little better than those without."""
    times = RoundTimes(TABLE)
    for drafted in (0, MOST) * 6:
        for _ in range(3):
            beside_ms = 1.0 if drafted else 3.0
            times.record(
                requests=32, tokens=32, drafted=drafted, step_ms=42.0, round_ms=42.0 + beside_ms
            )
    gate = DraftGate(times)
    gate.record([np.full(MOST, 1e-3, dtype=np.float32)] * 32)
    assert times.plain_ms(32) > times.step_ms(32, 32) + times.draft_ms(32, MOST)
    assert gate.capacity(32, MOST) == 0
    assert gate.gain(32, MOST) == 1.0
    assert not gate.would_pay(32, MOST)
    assert gate.block_size(32, MOST) == 0


def test_who_opens_by_mistake_does_not_start_over() -> None:
    """On a noisy machine what is lost by each mistake must stay a small share."""
    verifier = Verifier(draft_ms=12.0)
    fair = np.array([0.5, 0.1, 0.02, 0.0], dtype=np.float32)
    verifier.rounds(fair, 8000, requests=4)
    drafted = 0
    for _ in range(10):
        verifier.gate._size, verifier.gate._age = MOST, 0  # as an estimate at an odd moment does
        drafted += verifier.rounds(fair, 1200, requests=4)
    assert drafted < 0.05 * 10 * 1200
    verifier.draft_ms = 0.5
    verifier.rounds(GOOD, 9000, requests=4)
    assert verifier.rounds(GOOD, 100, requests=4) >= 90
    verifier.draft_ms = 12.0
    assert verifier.rounds(fair, 300, requests=4) > 30, "it paid for long, and may again"


def test_a_loads_first_steps_do_not_say_how_it_compares_with_others() -> None:
    """They take many times as long, while kernels are loaded for their shapes."""
    times = RoundTimes(TABLE)
    for _ in range(20):
        times.record(requests=1, tokens=5, drafted=MOST, step_ms=15.0, round_ms=19.0)
    for slower in (8.0, 6.0, 8.0, 6.0, *[1.0] * 12):
        step_ms = slower * TABLE.ms(16, 16, 0)
        times.record(requests=16, tokens=16, drafted=0, step_ms=step_ms, round_ms=step_ms + 0.5)
    assert times.step_ms(16, 16) == pytest.approx(TABLE.ms(16, 16, 0), rel=0.01)
    assert times.draft_ms(1, MOST) == pytest.approx(4.0, rel=0.55)
    before = times.draft_ms(16, MOST)
    assert before > 0.6 * growth(1, 16) * 4.0, "drafting is not thought cheap for it"


def test_slow_rounds_after_a_start_are_forgotten() -> None:
    verifier = Verifier(draft_ms=60.0)
    verifier.rounds(GOOD, 20)
    verifier.draft_ms = 2.0
    verifier.rounds(GOOD, 100)
    assert verifier.rounds(GOOD, 100) > 90


def test_one_slow_round_changes_nothing() -> None:
    verifier = Verifier()
    verifier.draft_ms = 500.0
    verifier.rounds(GOOD, 1)
    verifier.draft_ms = 2.0
    assert verifier.rounds(GOOD, 300) > 0.95 * 300


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_times_follow_what_is_measured(slower: float) -> None:
    times, wide_ms = RoundTimes(TABLE), slower * TABLE.ms(4, 6, 0)
    for _ in range(3):  # fewer are no measurement
        times.record(requests=4, tokens=4, drafted=0, step_ms=7.0, round_ms=7.2)
    for _ in range(15):
        times.record(
            requests=4,
            tokens=6,
            drafted=MOST,
            step_ms=wide_ms,
            round_ms=wide_ms + 4.5,
            waited_ms=2.0,
        )
    assert times.step_ms(4, 6) == pytest.approx(wide_ms)
    assert times.step_ms(4, 4) == pytest.approx(7.0)
    assert times.draft_ms(4, MOST) == pytest.approx(4.5)
    assert times.draft_ms(4, MOST, waits=False) == pytest.approx(2.5)
    assert times.plain_ms(4) == pytest.approx(7.2)
    # of a load that was never seen, the machine's speed is known
    assert times.step_ms(16, 24) == pytest.approx(slower * TABLE.ms(16, 24, 0))


def test_times_are_those_of_the_context() -> None:
    table = StepTimeTable((1, 4), (1, 5), (100, 500), (((10.0, 14.0),) * 2, ((20.0, 40.0),) * 2))
    times = RoundTimes(table)
    for context in (100.0, 300.0, 500.0, 100.0):
        times.set_context(context)
        assert times.step_ms(1, 3) == pytest.approx(table.ms(1, 3, context))
        for tokens in (np.array([1.0, 2.0]), np.arange(1.0, 30.0)):
            alone = [table.ms(1, each, context) for each in tokens]
            assert times.round_ms(1, tokens, MOST) == pytest.approx(alone)
    times.set_context(500.0)
    for _ in range(15):
        times.record(requests=1, tokens=1, drafted=0, step_ms=30.0, round_ms=30.0)
    times.set_context(100.0)
    assert times.step_ms(1, 1) == pytest.approx(15.0), "half as slow again, at every context"


def test_the_first_draft_token_is_not_charged_what_the_table_lacks_for_all() -> None:
    """The table thinks a second row a request free; it takes as much as the first."""
    times = RoundTimes(flat_table((1, 32), (1, 2), ((8.0, 8.0), (8.0, 8.0))))
    for tokens in (4, 8) * 20:
        times.record(requests=4, tokens=tokens, drafted=0, step_ms=2.0 * tokens, round_ms=20.0)
    assert [times.step_ms(4, tokens) for tokens in (4, 5, 8)] == pytest.approx([8.0, 10.0, 16.0])


def test_what_was_measured_before_the_machine_slowed_down_still_compares() -> None:
    """Drafting is measured on, plain rounds are not; both take twice as long now."""
    verifier = Verifier()
    for size in (0, MOST) * 20:
        verifier.times.record(
            requests=8, tokens=8 + size, drafted=size, step_ms=20.0 + size, round_ms=21.0 + 2 * size
        )
    verifier.gate.record([BAD])
    before = verifier.gate.gain(8, MOST)
    for _ in range(20):
        verifier.times.record(requests=8, tokens=12, drafted=MOST, step_ms=48.0, round_ms=58.0)
    assert verifier.gate.gain(8, MOST) == pytest.approx(before, rel=0.01)
    assert verifier.times.plain_ms(8) == pytest.approx(42.0, rel=0.01)


def test_noise_of_one_kind_of_rounds_does_not_add_up() -> None:
    """For an hour there is nothing but rounds without drafts, on a machine with many others."""
    verifier = Verifier()
    rng = np.random.default_rng(1)
    for size in (0, MOST) * 20:
        verifier.times.record(
            requests=8, tokens=8 + size, drafted=size, step_ms=20.0 + size, round_ms=21.0 + 2 * size
        )
    verifier.gate.record([BAD])
    before = verifier.gate.gain(8, MOST)
    for _ in range(5000):
        step_ms = 20.0 * float(rng.lognormal(0.0, 0.2))
        verifier.times.record(requests=8, tokens=8, drafted=0, step_ms=step_ms, round_ms=step_ms)
    assert verifier.gate.gain(8, MOST) == pytest.approx(before, rel=0.05)


def test_the_gain_is_that_of_the_plans() -> None:
    verifier = Verifier(draft_ms=0.0)
    verifier.gate.record([GOOD])
    # 11 ms and 1 ms more for each draft token: all four are worth it
    tokens = 1 + float(GOOD.sum())
    assert verifier.gate.gain(1, MOST) == pytest.approx(tokens / 15.0 * 11.0, rel=1e-5)


def test_the_gain_is_no_more_than_a_search_that_stops_at_a_dent_brings() -> None:
    dented = flat_table((1, 2), (1, 2, 4, 5), ((10.0, 19.0, 19.0, 30.0),) * 2)
    gate = DraftGate(RoundTimes(dented))
    gate.record([GOOD])
    three = 1 + float(GOOD[:3].sum())
    assert gate.gain(1, MOST, search="global") == pytest.approx(three / 19.0 * 10.0, rel=1e-5)
    # Algorithm 1 admits nothing, although whole blocks would gain a third
    assert gate.gain(1, MOST, search="causal") == pytest.approx(1.0)


def test_blocks_are_as_long_as_pays() -> None:
    """Where drafting takes long by the token, what is seldom accepted is not drafted."""
    fair = np.array([0.7, 0.05, 0.02, 0.0], dtype=np.float32)
    verifier = Verifier(draft_ms=4.0)
    verifier.rounds(fair, 200)
    verifier.rounds(fair, 1280)
    assert verifier.sizes[1] > 0.9 * 1280
    assert verifier.sizes[MOST] >= 10, "whole blocks must go on being looked at"
    verifier.rounds(GOOD, 2000)
    verifier.rounds(GOOD, 640)
    assert verifier.sizes[MOST] > 0.9 * 640, "and be noticed when they become good"


def test_confidences_that_promise_too_much_are_seen_through() -> None:
    verifier = Verifier(draft_ms=2.0)
    fair = np.array([0.5, 0.2, 0.1, 0.0], dtype=np.float32)
    assert verifier.rounds(fair, 100) > 90
    for _ in range(500):
        verifier.gate.settle(0.7, 0)
    verifier.rounds(fair, 20)
    assert verifier.rounds(fair, 100) < 20


def test_slow_blocks_pay_when_others_are_stepped_meanwhile() -> None:
    """40 ms for a block, steps of as much: hidden, it is worth having; waited for, it is not."""
    times = RoundTimes(flat_table((1, 32), (1, 5), ((11.0, 11.0), (321.0, 321.0))))  # 10 a request
    fair = np.array([0.6, 0.4, 0.2, 0.1], dtype=np.float32)
    gate = DraftGate(times)
    gate.record([fair])
    for _ in range(4):
        times.record(
            requests=8, tokens=16, drafted=MOST, step_ms=81.0, round_ms=221.0, waited_ms=140.0
        )
    waiting, hiding = gate.gain(8, MOST), gate.gain(8, MOST, latency_ms=40.0)
    assert waiting < 1.0 < hiding
    assert times.overlapped_ms(8, 16, MOST, 40.0) == pytest.approx(2 * 41.0, rel=0.05)
    assert times.overlapped_ms(8, 16, MOST, 400.0) == pytest.approx(441.0, rel=0.05)
    assert times.merging_saves_ms((4, 8), (4, 8)) == pytest.approx(1.0, rel=0.1)


def test_rounds_asked_for_in_a_row_are_those_asked_for_alone() -> None:
    verifier = Verifier(draft_ms=4.0)
    verifier.rounds(np.array([0.9, 0.7, 0.5, 0.2], dtype=np.float32), 100)
    times = verifier.times
    times.set_context(10_000.0)  # nothing is kept from before
    for least, most in ((2, 4), (1, 40), (7, 7)):
        tokens = np.arange(least, most + 1.0)
        expected = times.round_ms(1, tokens, MOST)
        assert times.rounds_ms(1, least, most, MOST) == pytest.approx(expected)


def test_an_open_gate_goes_on_measuring_rounds_without_drafts() -> None:
    """Rounds without drafts were slow when it opened; that they are fast now must be noticed."""
    fair = np.array([0.3, 0.1, 0.05, 0.02], dtype=np.float32)
    verifier = Verifier(draft_ms=4.0)
    for _ in range(20):
        verifier.times.record(requests=1, tokens=1, drafted=0, step_ms=11.0, round_ms=19.0)
    verifier.rounds(fair, 20)
    assert verifier.gate.gain(1, MOST) > 1.1
    assert verifier.rounds(fair, 60) > 50
    verifier.rounds(fair, 1500)
    assert verifier.gate.gain(1, MOST) < 1.0


@pytest.mark.parametrize(("prefill", "bound"), [(0, 1.02), (2, 1.08)])
def test_a_table_that_is_wrong_about_plain_steps_is_found_out_soon(
    prefill: int, bound: float
) -> None:
    """A hiccup while it was made; as long as drafting seems to pay by far, nothing else is run.

    It is found out where prompts take part in every step, too, which makes drafts cost less there.
    """
    fair = np.array([0.3, 0.12, 0.04, 0.016], dtype=np.float32)
    wrong = flat_table((1, 32), (1, 5), ((30.0, 30.0), (60.0, 170.0)))
    verifier = Verifier(draft_ms=4.0, believed=wrong, prefill=prefill)
    assert verifier.rounds(fair, 6) == 6
    assert verifier.gate.gain(1, MOST) > 1.05
    assert verifier.rounds(fair, 64) < 64
    assert verifier.gate.gain(1, MOST) < bound


def test_survivals_that_underflow_are_no_chance() -> None:
    verifier = Verifier()
    verifier.rounds(np.array([0.5, 0.0, 0.0, 0.0], dtype=np.float32), 20)
    assert verifier.gate.gain(1, MOST) > 0.0


def test_it_tells_probing_from_drafting_that_pays() -> None:
    verifier = Verifier()
    assert verifier.gate.open  # nothing is known yet
    verifier.rounds(GOOD, 100)
    assert verifier.gate.open
    verifier.draft_ms = 5.0
    verifier.rounds(BAD, 500)
    assert not verifier.gate.open
    while not verifier.rounds(BAD, 1):
        pass
    assert not verifier.gate.open  # a probe


def test_it_says_at_which_loads_blocks_would_pay_although_none_can_be_had() -> None:
    assert Verifier().gate.would_pay(32, MOST), "of what is not known, one has to learn"
    verifier = Verifier()
    verifier.rounds(GOOD, 100)
    verifier.draft_ms = 200.0
    verifier.rounds(GOOD, 500, requests=32)
    assert verifier.gate.would_pay(1, MOST)
    assert not verifier.gate.would_pay(32, MOST)
