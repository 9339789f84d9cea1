"""What users saw of a server: waits, gaps, speeds, and how much of it met an SLA.

    time to first token    first event with text − when the request was due
    time per output token  (last event − first event) / (tokens − 1), of one request
    gap                    between one event with text and the next; an event carries every token
                           of an accepted block, so gaps are longer than times per token
    per-user speed         1 / median time per output token
    tokens a second        of all requests, that came within the window

The window of a turn leaves out the warm-up, when the server fills, and the cool-down, when nobody
asks any more and it empties. Latencies are of requests that were due in the window, rates are of
tokens and last tokens that came in it. Failures count wherever they happen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it, on one clock. Unless it failed, text came and it ended."""

    due_s: float  # when it should have been sent: a late client is no merit of the server
    event_s: tuple[float, ...]  # when each event with text came
    output_tokens: int
    prompt_tokens: int | None = None  # as the server counted; None if it did not
    counted: bool = True  # by the server; else every event was taken for one token
    failure: str = ""  # why there is no whole answer

    @property
    def ttft_ms(self) -> float:
        return (self.event_s[0] - self.due_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """None where there is nothing to measure: one event, or one token."""
        if len(self.event_s) < 2 or self.output_tokens < 2:
            return None
        return (self.event_s[-1] - self.event_s[0]) * 1e3 / (self.output_tokens - 1)

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.event_s, self.event_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Turn:
    """All requests of one stretch of load, and the window in which the load was steady."""

    records: tuple[RequestRecord, ...]
    start_s: float
    end_s: float

    @property
    def window_s(self) -> float:
        return self.end_s - self.start_s

    def holds(self, moment_s: float) -> bool:
        return self.start_s <= moment_s <= self.end_s

    def tokens(self, record: RequestRecord) -> float:
        """Tokens of `record` that came in the window, taking its events for equally long."""
        inside = sum(map(self.holds, record.event_s))
        return record.output_tokens * inside / len(record.event_s)


@dataclass(frozen=True, slots=True)
class Sla:
    """What a request must keep to be good; None asks for nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, record: RequestRecord) -> bool:
        """An answer without a time per output token keeps any."""
        return (self.ttft_ms is None or record.ttft_ms <= self.ttft_ms) and (
            self.tpot_ms is None or record.tpot_ms is None or record.tpot_ms <= self.tpot_ms
        )


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Turns of one endpoint under one load, taken together. None: no request to tell it by."""

    requests: int  # sent, failed and unmeasured ones included
    failures: dict[str, int]  # by reason
    measured: int  # answered, and due in a window
    window_s: float
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    gap_ms: Percentiles | None
    tokens_per_s: float
    requests_per_s: float
    good_tokens_per_s: float
    good_requests_per_s: float
    user_tokens_per_s: float | None
    tokens_per_event: float | None
    output_tokens: float | None  # mean of an answer
    prompt_tokens: float | None  # mean of a prompt
    counted: bool  # all tokens, by the server


def summarise(turns: Sequence[Turn], sla: Sla) -> Summary:
    """Percentiles over all requests and gaps, rates over all windows."""
    window_s = sum(turn.window_s for turn in turns)
    answered = [(turn, r) for turn in turns for r in turn.records if not r.failure]
    measured = [r for turn, r in answered if turn.holds(r.due_s)]
    ended = [r for turn, r in answered if turn.holds(r.event_s[-1])]
    good = [(turn, r) for turn, r in answered if sla.met(r)]
    tpot_ms = _percentiles(r.tpot_ms for r in measured if r.tpot_ms is not None)
    events = sum(len(r.event_s) for r in measured)
    return Summary(
        requests=sum(len(turn.records) for turn in turns),
        failures=dict(Counter(r.failure for turn in turns for r in turn.records if r.failure)),
        measured=len(measured),
        window_s=window_s,
        ttft_ms=_percentiles(r.ttft_ms for r in measured),
        tpot_ms=tpot_ms,
        gap_ms=_percentiles(gap for r in measured for gap in r.gaps_ms),
        tokens_per_s=sum(turn.tokens(r) for turn, r in answered) / window_s,
        requests_per_s=len(ended) / window_s,
        good_tokens_per_s=sum(turn.tokens(r) for turn, r in good) / window_s,
        good_requests_per_s=sum(map(sla.met, ended)) / window_s,
        user_tokens_per_s=1e3 / tpot_ms.p50 if tpot_ms and tpot_ms.p50 else None,
        tokens_per_event=sum(r.output_tokens for r in measured) / events if events else None,
        output_tokens=_mean(r.output_tokens for r in measured),
        prompt_tokens=_mean(r.prompt_tokens for r in measured if r.prompt_tokens is not None),
        counted=all(r.counted for _, r in answered),
    )


def _percentiles(values: Iterable[float]) -> Percentiles | None:
    listed = list(values)
    if not listed:
        return None
    p50, p90, p99 = np.percentile(listed, (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99))


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
