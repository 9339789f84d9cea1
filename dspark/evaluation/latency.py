"""From records of requests to what an operator asks: how fast, for how many, and how surely.

Time to first token (TTFT) counts from sending. A streamed event may hold several tokens, so two
things are told apart: the mean time of a token within an answer (TPOT), and the gap between events
that a reader sees. Goodput counts requests that keep both bounds of a service level agreement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.evaluation.openai_client import Record


@dataclass(frozen=True, slots=True)
class Agreement:
    """Bounds that a good answer keeps."""

    ttft_ms: float
    tpot_ms: float

    def keeps(self, record: Record) -> bool:
        """Whether a request was answered whole and in time."""
        return (
            not record.failure
            and record.first_token_s * 1e3 <= self.ttft_ms
            and record.per_token_s * 1e3 <= self.tpot_ms
        )


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """One endpoint under one load. Times of those answered; failures are counted."""

    requests: int
    failures: dict[str, int]  # by reason
    tokens_per_s: float  # of all users together
    user_tokens_per_s: float  # median over answers of 1 / TPOT
    ttft_ms: tuple[float, float, float]  # p50, p90, p99
    tpot_ms: tuple[float, float, float]
    gap_ms: tuple[float, float, float]  # between events
    goodput_per_s: float  # requests that keep the agreement
    good_share: float


def summarise(records: Sequence[Record], agreement: Agreement) -> LatencyReport:
    """The report of one run; ValueError without records.

    Rates are over the time in which requests were sent: what comes after the last of them is the
    load running out.
    """
    if not records:
        raise ValueError("no request was sent")
    answered = [record for record in records if not record.failure]
    begin, end = min(r.sent_at for r in records), max(r.sent_at for r in records)
    if begin == end:  # a single request: all of it
        end = max(r.ended_at for r in records)
    took_s = max(end - begin, 1e-9)
    good = sum(agreement.keeps(record) for record in records)
    speeds = [1.0 / r.per_token_s for r in answered if r.per_token_s > 0.0]
    return LatencyReport(
        requests=len(records),
        failures=dict(Counter(r.failure for r in records if r.failure)),
        tokens_per_s=sum(_tokens_until(r, end) for r in answered) / took_s,
        user_tokens_per_s=float(np.median(speeds)) if speeds else 0.0,
        ttft_ms=_percentiles([r.first_token_s for r in answered]),
        tpot_ms=_percentiles([r.per_token_s for r in answered if r.tokens > 1]),
        gap_ms=_percentiles([g for r in answered for g in np.diff(r.event_times).tolist()]),
        goodput_per_s=good / took_s,
        good_share=good / len(records),
    )


def _tokens_until(record: Record, end: float) -> float:
    """Tokens that had come by then; an event's share of them is the same for all events."""
    events = sum(at <= end for at in record.event_times)
    return record.tokens * events / len(record.event_times)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    if not seconds:
        return (0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99)).tolist()
    return p50, p90, p99
