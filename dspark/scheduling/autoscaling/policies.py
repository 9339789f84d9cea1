"""How many verifiers and how many draft replicas there should be, by what they report.

Nothing goes while a report is missing: an absent figure is not a low one. Policies are pure, with
the clock given: what they must remember is in the state that they return, plain JSON, and is handed
back at the next call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.config import DraftScaling, VerifierScaling
from dspark.scheduling.autoscaling.forecast import DailyForecast
from dspark.scheduling.autoscaling.hysteresis import Hysteresis
from dspark.scheduling.autoscaling.signals import DraftSignals, VerifierSignals

_MOST_GROWTH = 2.0  # at a time, where a figure says that there are too few but not by how many
_HOLDS = 0.25  # of a limit on waiting; what waits for so long waits for want of room


@dataclass(frozen=True, slots=True)
class Pool:
    """A deployment, as Ray Serve sees it."""

    target: int  # replicas that there should be, up to now
    least: int
    most: int

    def bounded(self, count: int) -> int:
        """`count`, within the bounds."""
        return max(self.least, min(self.most, count))


@dataclass(frozen=True, slots=True)
class Decision:
    """Replicas that there should be from now on, and what to hand back at the next call."""

    replicas: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class VerifierView:
    """What the draft replicas' policy has to know of the verifiers."""

    at: float  # when it was taken, seconds
    replicas: int
    complete: bool  # every verifier has reported
    requests: float = 0.0
    wanted: float = 0.0  # by the verifier that wants drafts most, in shares of its rounds
    missed: float = 0.0  # by the verifier that misses most

    @classmethod
    def of(
        cls, now: float, replicas: int, readings: Sequence[VerifierSignals | None]
    ) -> VerifierView:
        """From the verifiers' reports."""
        heard = [r for r in readings if r is not None]
        return cls(
            at=now,
            replicas=replicas,
            complete=bool(heard) and len(heard) == len(readings),
            requests=sum(r.requests for r in heard),
            wanted=max((r.drafts_wanted for r in heard), default=0.0),
            missed=max((r.blocks_missed for r in heard), default=0.0),
        )


class VerifierPolicy:
    """By KV pressure, queue age and floors; with policy `forecast`, by the time of day too."""

    def __init__(self, settings: VerifierScaling) -> None:
        self._settings = settings
        self._hysteresis = _hysteresis(settings)
        forecasts = settings.policy == "forecast"
        self._forecast = DailyForecast(settings.lead_s) if forecasts else None

    def needed(self, readings: Sequence[VerifierSignals | None]) -> float:
        """Replicas that the load at hand asks for; a replica that is not heard carries none."""
        settings, ready = self._settings, len(readings)
        heard = [r for r in readings if r is not None]
        if not heard:
            return 0.0
        by_cache = sum(r.kv_pressure for r in heard) / settings.kv_pressure
        age_s = max(r.queue_age_s for r in heard)
        by_queue = ready * _growth(age_s / settings.queue_age_s, _HOLDS)
        floors, target = min(r.floor_attainment for r in heard), settings.floor_attainment
        # Between the target and all floors met, fewer replicas would soon miss it.
        by_floors = ready * _growth(target / max(floors, 1e-6), 2.0 * target / (1.0 + target))
        return max(by_cache, by_queue, by_floors)

    def decide(
        self,
        now: float,
        pool: Pool,
        readings: Sequence[VerifierSignals | None],  # of each that runs
        state: Mapping[str, Any],
    ) -> Decision:
        """The count from now on."""
        needed = self.needed(readings)
        kept: dict[str, Any] = {}
        if self._forecast is not None:
            kept["forecast"] = forecast = dict(state.get("forecast", {}))
            ahead = self._forecast.ahead(now, forecast)
            if any(r is not None for r in readings):
                kept["forecast"] = self._forecast.observe(now, needed, forecast)
            needed = max(needed, ahead)
        replicas, kept["hysteresis"] = self._hysteresis.settle(
            now,
            pool.target,
            pool.bounded(self._hysteresis.recommend(pool.target, needed)),
            state.get("hysteresis", {}),
            may_shrink=bool(readings) and None not in readings,
        )
        return Decision(pool.bounded(replicas), kept)


class DraftPolicy:
    """By busy time and missed deadlines, in a ratio to verifiers; to none while none are wanted."""

    def __init__(self, settings: DraftScaling, stale_after_s: float) -> None:
        self._settings, self._stale_after_s = settings, stale_after_s
        self._hysteresis = _hysteresis(settings)

    def needed(self, readings: Sequence[DraftSignals | None], missed: float) -> float:
        """Replicas that the load at hand asks for, if any are wanted."""
        busy = sum(r.busy for r in readings if r is not None) / self._settings.busy
        return max(busy, len(readings) * _growth(missed / self._settings.missed, 0.5))

    def decide(
        self,
        now: float,
        pool: Pool,
        readings: Sequence[DraftSignals | None],  # of each that runs
        verifiers: VerifierView | None,
        state: Mapping[str, Any],
    ) -> Decision:
        """The count from now on; without word from the verifiers, as it was."""
        if verifiers is None or now - verifiers.at > self._stale_after_s:
            before = {**state["demand"], "pending": now} if "demand" in state else {}
            return Decision(pool.bounded(pool.target), {"demand": before})
        kept: dict[str, Any] = {"demand": self._demand(now, pool, verifiers, state)}
        if not kept["demand"]["wanted"]:
            replicas = pool.least if verifiers.complete else max(pool.least, pool.target)
            return Decision(pool.bounded(replicas), kept)
        low = max(1, math.ceil(verifiers.replicas * self._settings.min_ratio))
        high = max(low, math.floor(verifiers.replicas * self._settings.max_ratio))
        if pool.target == 0:  # wanted for long enough already
            return Decision(pool.bounded(low), kept)
        needed = self.needed(readings, verifiers.missed)
        wanted = max(low, min(high, self._hysteresis.recommend(pool.target, needed)))
        replicas, kept["hysteresis"] = self._hysteresis.settle(
            now,
            pool.target,
            pool.bounded(wanted),
            state.get("hysteresis", {}),
            may_shrink=verifiers.complete and bool(readings) and None not in readings,
        )
        return Decision(pool.bounded(replicas), kept)

    def _demand(
        self, now: float, pool: Pool, verifiers: VerifierView, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Whether drafts are wanted: at the moment for long enough, or as before."""
        settings = self._settings
        before = state.get("demand", {})
        wanted = before.get("wanted", pool.target > 0)
        changed = min(now, before.get("changed", now))
        pending = min(now, before.get("pending", now))  # since when it looks otherwise
        seen = verifiers.wanted >= settings.wanted
        if seen == wanted or not (seen or verifiers.complete):
            pending = now
        elif now - pending >= (settings.wake_after_s if seen else settings.zero_after_s):
            wanted, changed, pending = seen, now, now
        # Verifiers judge by what they knew of texts when drafts went; texts change.
        retry_s = settings.retry_after_s
        if not wanted and retry_s and verifiers.requests and now - changed >= retry_s:
            wanted, changed, pending = True, now, now
        return {"wanted": wanted, "changed": changed, "pending": pending}


def _hysteresis(settings: VerifierScaling | DraftScaling) -> Hysteresis:
    return Hysteresis(settings.up_after_s, settings.down_after_s, settings.deadband)


def _growth(strain: float, holds: float) -> float:
    """Factor on the replicas there are: to grow at a strain above 1, to stay from `holds` on."""
    if strain > 1.0:
        return min(strain, _MOST_GROWTH)
    return 1.0 if strain >= holds else 0.0
