"""What replicas report, and how it is read: an absent, empty or old report is none, never a zero.

Ray Serve hands a policy the samples of each figure by replica, and reads a figure without samples
as 0.0 when it aggregates them itself; so they are read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class VerifierSignals:
    """One verifier's figures, since its last report where they are shares of something."""

    kv_pressure: float  # share of KV pages that requests hold
    queue_age_s: float  # how long the oldest waiting request has waited; 0: nobody waits
    floor_attainment: float  # share of requests with a tokens/s floor that are above it; 1: all
    requests: float  # running and waiting
    drafts_wanted: float  # share of rounds in which blocks of a draft replica would have paid
    blocks_missed: float  # share of blocks asked for that missed their deadline


@dataclass(frozen=True, slots=True)
class DraftSignals:
    """One draft replica's figures, since its last report."""

    busy: float  # share of the time that it was drafting or taking in context


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What a verifier did about drafts, since its start."""

    rounds: int = 0
    wanting: int = 0  # rounds in which blocks of a draft replica would have paid
    blocks: int = 0  # asked for
    missed: int = 0  # of those, by their deadline


class Share:
    """Of a total that only grows, the share of a part of it, from one look to the next."""

    def __init__(self, part: float = 0.0, total: float = 0.0) -> None:
        self._part, self._total = part, total

    def look(self, part: float, total: float) -> float:
        """0 if nothing was added since the last look."""
        added, of = part - self._part, total - self._total
        self._part, self._total = part, total
        return min(1.0, added / of) if of > 0.0 else 0.0


class Sample(Protocol):
    """One value, as Ray Serve keeps them."""

    timestamp: float  # seconds, wall clock
    value: float


Signals = TypeVar("Signals", VerifierSignals, DraftSignals)


def to_stats(signals: VerifierSignals | DraftSignals) -> dict[str, float]:
    """For `record_autoscaling_stats`: numbers only, or Serve leaves all of them out for good."""
    return {name: float(value) for name, value in asdict(signals).items()}


def read(
    kind: type[Signals],
    samples: Mapping[str, Mapping[Any, Sequence[Sample]]],  # by name of a figure, then by replica
    replicas: Sequence[Any],
    now: float,
    stale_after_s: float,
) -> list[Signals | None]:
    """What each replica reports, the mean of its samples; None of one that lacks a fresh figure."""
    names = [f.name for f in fields(kind)]
    readings: list[Signals | None] = []
    for replica in replicas:
        means = [_mean(samples.get(n, {}).get(replica, ()), now - stale_after_s) for n in names]
        figures = {n: mean for n, mean in zip(names, means, strict=True) if mean is not None}
        readings.append(kind(**figures) if len(figures) == len(names) else None)
    return readings


def _mean(series: Sequence[Sample], oldest: float) -> float | None:
    if not series or series[-1].timestamp < oldest:
        return None
    values = [sample.value for sample in series]
    good = all(math.isfinite(value) and value >= 0.0 for value in values)
    return sum(values) / len(values) if good else None
