"""Summaries of requests: each figure by hand, and what holds between them for any requests."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.evaluation.latency import RequestRecord, Sla, Turn, summarise

NO_SLA = Sla()


def record(due_s: float, *event_s: float, tokens: int = 0, failure: str = "") -> RequestRecord:
    return RequestRecord(due_s, event_s, tokens or len(event_s), 5, failure=failure)


def test_one_request_by_hand() -> None:
    # 9 tokens in 3 events: a first one, then two blocks of four
    summary = summarise([Turn((record(1.0, 1.5, 1.7, 2.3, tokens=9),), 0.0, 4.0)], NO_SLA)
    assert summary.ttft_ms is not None
    assert summary.tpot_ms is not None
    assert summary.gap_ms is not None
    assert summary.ttft_ms.p50 == pytest.approx(500)
    assert summary.tpot_ms.p50 == pytest.approx(800 / 8)
    assert summary.gap_ms.p50 == pytest.approx(400)  # between 200 and 600
    assert summary.user_tokens_per_s == pytest.approx(10)
    assert summary.tokens_per_event == 3
    assert summary.tokens_per_s == pytest.approx(9 / 4)
    assert summary.requests_per_s == pytest.approx(1 / 4)
    assert (summary.output_tokens, summary.prompt_tokens) == (9, 5)


def test_warm_up_and_cool_down_are_left_out() -> None:
    turn = Turn(
        (
            record(0.0, 0.5, 1.5, 2.5),  # due in the warm-up: two of three tokens in the window
            record(2.0, 2.2, 2.4),  # all within
            record(2.9, 2.95, 3.5),  # due within, and half of it behind
            record(3.1, 3.2),  # due behind
        ),
        start_s=1.0,
        end_s=3.0,
    )
    summary = summarise([turn], NO_SLA)
    assert (summary.requests, summary.measured) == (4, 2)
    assert summary.tokens_per_s == pytest.approx((2 + 2 + 1) / 2)
    assert summary.requests_per_s == pytest.approx(2 / 2)  # the first two ended within
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.p50 == pytest.approx((200 + 50) / 2)


def test_turns_are_taken_together() -> None:
    first = Turn((record(0.0, 0.1, 0.2),), 0.0, 1.0)
    second = Turn((record(5.0, 5.1, 5.2, 5.3, 5.4),), 5.0, 8.0)
    summary = summarise([first, second], NO_SLA)
    assert summary.window_s == pytest.approx(4.0)
    assert summary.tokens_per_s == pytest.approx(6 / 4)
    assert summary.requests_per_s == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("sla", "good"),
    [
        (Sla(ttft_ms=300), 1),
        (Sla(tpot_ms=150), 2),  # a lone token has no time per token to miss it by
        (Sla(ttft_ms=300, tpot_ms=150), 0),
        (Sla(ttft_ms=1000, tpot_ms=1000), 3),
        (NO_SLA, 3),
    ],
)
def test_goodput_is_what_meets_the_sla(sla: Sla, good: int) -> None:
    records = (record(0.0, 0.2, 0.4), record(0.0, 0.5, 0.6), record(0.0, 0.9))
    summary = summarise([Turn(records, 0.0, 1.0)], sla)
    assert summary.good_requests_per_s == good
    assert summary.good_tokens_per_s == sum(len(r.event_s) for r in records if sla.met(r))


def test_failures_are_counted_by_reason_wherever_they_are() -> None:
    records = (
        record(0.0, failure="HTTP 429"),  # in the warm-up
        record(1.5, failure="HTTP 429"),
        record(1.5, 1.6, 1.7, failure="broken stream"),
        record(1.5, 1.6, 1.8),
    )
    summary = summarise([Turn(records, 1.0, 2.0)], NO_SLA)
    assert summary.failures == {"HTTP 429": 2, "broken stream": 1}
    assert (summary.requests, summary.measured) == (4, 1)
    assert summary.tokens_per_s == 2  # what came of a broken answer is no throughput


def test_where_nothing_was_answered_there_is_no_latency() -> None:
    summary = summarise([Turn((record(0.0, failure="timeout"),), 0.0, 1.0)], NO_SLA)
    assert summary.ttft_ms is summary.tpot_ms is summary.gap_ms is summary.user_tokens_per_s is None
    assert summary.tokens_per_s == summary.requests_per_s == 0


def test_one_uncounted_answer_is_told() -> None:
    uncounted = RequestRecord(0.0, (0.1, 0.2), 2, counted=False)
    turn = Turn((record(0.0, 0.1), uncounted), 0.0, 1.0)
    assert not summarise([turn], NO_SLA).counted
    assert summarise([Turn((record(0.0, 0.1),), 0.0, 1.0)], NO_SLA).counted


@st.composite
def records_of(draw: st.DrawFn) -> RequestRecord:
    # Sixteenths of a second: sums are exact, so that the order of records changes no bit.
    steps = [0, *draw(st.lists(st.integers(0, 8), max_size=7))]
    due = draw(st.integers(0, 160))
    events = [due + sum(steps[: i + 1]) for i in range(len(steps))]
    return RequestRecord(
        due / 16,
        tuple(moment / 16 for moment in events),
        len(events) * 2 ** draw(st.integers(0, 2)),
        failure=draw(st.sampled_from(["", "", "HTTP 429", "timeout"])),
    )


SLAS = st.builds(Sla, *[st.none() | st.floats(0, 4000)] * 2)


@given(st.lists(records_of(), max_size=12), SLAS)
def test_what_holds_for_any_requests(records: list[RequestRecord], sla: Sla) -> None:
    summary = summarise([Turn(tuple(records), 2.0, 10.0)], sla)
    assert sum(summary.failures.values()) + sum(not r.failure for r in records) == summary.requests
    assert 0 <= summary.good_requests_per_s <= summary.requests_per_s
    assert 0 <= summary.good_tokens_per_s <= summary.tokens_per_s
    answered = sum(r.output_tokens for r in records if not r.failure)
    assert summary.tokens_per_s * summary.window_s <= answered
    for percentiles in (summary.ttft_ms, summary.tpot_ms, summary.gap_ms):
        if percentiles is not None:
            assert 0 <= percentiles.p50 <= percentiles.p90 <= percentiles.p99


@given(st.lists(records_of(), max_size=12), SLAS)
def test_the_order_of_requests_does_not_matter(records: list[RequestRecord], sla: Sla) -> None:
    forth, back = (
        asdict(summarise([Turn(tuple(order), 2.0, 10.0)], sla))
        for order in (records, records[::-1])
    )
    assert forth == back


@given(st.lists(records_of(), min_size=1, max_size=12))
def test_parts_of_the_window_add_up(records: list[RequestRecord]) -> None:
    # 5 + 1/32 is no event's time, so that none lies in both
    whole, first, second = (
        summarise([Turn(tuple(records), start, end)], NO_SLA)
        for start, end in ((2.0, 9.0), (2.0, 5 + 1 / 32), (5 + 1 / 32, 9.0))
    )
    tokens = [s.tokens_per_s * s.window_s for s in (whole, first, second)]
    assert tokens[0] == pytest.approx(tokens[1] + tokens[2])
