"""Whether steps bring what they were planned to: Θ measured against Θ predicted.

Both are sums over some hundreds of steps, the latest counting most: one step commits a whole number
of tokens and cannot meet an expectation. A step that took many times its prediction counts as a few
times of it: a machine that hung once has not changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_STEPS = 256.0  # that the sums are over
_LEAST_STEPS = 64  # before there is an alarm
_CLEARED_BELOW = 0.5  # of the threshold
_STRETCH = 4.0  # of a step's predicted time, and no further


@dataclass(slots=True)
class PredictedThroughput:
    """Of one verifier. The fields are the metrics; sums weigh a step's age."""

    alarm_above: float  # |log(measured / predicted)|; 0: no alarm
    steps: int = 0
    predicted_tokens: float = 0.0
    predicted_ms: float = 0.0
    measured_tokens: float = 0.0
    measured_ms: float = 0.0
    alarm: bool = False

    def take(
        self, predicted_tokens: float, predicted_ms: float, measured_tokens: int, measured_ms: float
    ) -> bool:
        """Take in a step of positive times and predicted tokens; whether the alarm changed."""
        keep = 1.0 - 1.0 / _STEPS
        took_ms = min(max(measured_ms, predicted_ms / _STRETCH), predicted_ms * _STRETCH)
        self.steps += 1
        self.predicted_tokens = keep * self.predicted_tokens + predicted_tokens
        self.predicted_ms = keep * self.predicted_ms + predicted_ms
        self.measured_tokens = keep * self.measured_tokens + measured_tokens
        self.measured_ms = keep * self.measured_ms + took_ms
        before = self.alarm
        if self.alarm_above and self.steps >= _LEAST_STEPS:
            off = abs(math.log(self.ratio)) if self.ratio else math.inf
            limit = self.alarm_above * (_CLEARED_BELOW if before else 1.0)
            self.alarm = off > limit
        return self.alarm != before

    @property
    def token_ratio(self) -> float:
        """Tokens committed over those expected; 1 before any step."""
        return self.measured_tokens / self.predicted_tokens if self.steps else 1.0

    @property
    def time_ratio(self) -> float:
        """Time taken over that predicted; 1 before any step."""
        return self.measured_ms / self.predicted_ms if self.steps else 1.0

    @property
    def ratio(self) -> float:
        """Θ measured over Θ predicted; 1 before any step."""
        return self.token_ratio / self.time_ratio

    @property
    def predicted_per_s(self) -> float:
        """Θ predicted: tokens a second; 0 before any step."""
        return 1e3 * self.predicted_tokens / self.predicted_ms if self.steps else 0.0

    @property
    def measured_per_s(self) -> float:
        """Θ measured: tokens a second; 0 before any step."""
        return 1e3 * self.measured_tokens / self.measured_ms if self.steps else 0.0
