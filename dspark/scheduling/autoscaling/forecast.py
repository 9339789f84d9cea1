"""What is usually needed at a time of day, so that replicas are there before the peak is.

A day has 96 bins. Each holds the mean need of its quarter of an hour, the newest day counting for
most. A bin that has never been seen says nothing. Days are of UTC, and all alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BIN_S = 900
_BINS = 86400 // _BIN_S
_NEWEST_DAY = 0.3  # its weight


@dataclass(frozen=True, slots=True)
class DailyForecast:
    """Looks `lead_s` ahead. Its state is JSON: a bin is None until it has been seen."""

    lead_s: float

    def observe(self, now: float, needed: float, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with one more observation; bins are averaged when they are over."""
        at = int(now // _BIN_S)
        bins: list[float | None] = state.get("bins") or [None] * _BINS
        total, count = state.get("total", 0.0), state.get("count", 0)
        last = state.get("at", at)
        if at != last:
            mean, before = total / count, bins[last % _BINS]
            bins = list(bins)  # the state that was given stays as it is
            bins[last % _BINS] = mean if before is None else before + _NEWEST_DAY * (mean - before)
            total, count = 0.0, 0
        return {"bins": bins, "at": at, "total": total + needed, "count": count + 1}

    def ahead(self, now: float, state: Mapping[str, Any]) -> float:
        """The most that is usually needed from now until `lead_s` from now; 0 if not known."""
        bins: list[float | None] = state.get("bins") or []
        first, last = int(now // _BIN_S), int((now + self.lead_s) // _BIN_S)
        seen = [bins[at % _BINS] for at in range(first, last + 1)] if bins else []
        return max((value for value in seen if value is not None), default=0.0)
