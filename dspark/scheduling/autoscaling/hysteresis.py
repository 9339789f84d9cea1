"""From what is needed at the moment to a count that changes seldom: up soon, down late.

A need within the deadband changes nothing. One outside it must last: on the way up, the least that
was needed meanwhile is what comes; on the way down, the most is what stays. So a count that has
just changed cannot change back before the other delay has passed, whatever the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """Delays in seconds; the deadband as a share of the count."""

    up_after_s: float
    down_after_s: float
    deadband: float

    def recommend(self, current: int, needed: float) -> int:
        """Replicas for a need of so many; `current` while it is near."""
        if needed > current * (1.0 + self.deadband):
            return math.ceil(needed)
        return min(current, math.ceil(needed * (1.0 + self.deadband)))

    def settle(
        self,
        now: float,
        current: int,
        wanted: int,
        state: Mapping[str, Any],
        *,
        may_shrink: bool,
    ) -> tuple[int, dict[str, Any]]:
        """The count from now on, and the state for the next call: how long more or fewer were
        wanted, and how many."""
        if wanted > current:
            direction, delay_s = "up", self.up_after_s
        elif wanted < current and may_shrink:
            direction, delay_s = "down", self.down_after_s
        else:
            return current, {}
        since, to = now, wanted
        if state.get("direction") == direction:
            since = min(now, state["since"])  # a clock that was set back must not stop us
            to = min(wanted, state["to"]) if direction == "up" else max(wanted, state["to"])
        if now - since >= delay_s:
            return to, {}
        return current, {"direction": direction, "since": since, "to": to}
