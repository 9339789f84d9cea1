"""How long rounds really take: the step-time table, corrected by what was lately measured.

A table is made once, on a machine that did nothing else. What steps take later differs by tens of
percent, and what drafting adds to a round (waiting, features, the planner itself) is in no table.
Both are followed here for each size of load, as running medians: one step that the operating system
interrupted says nothing about the next.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

from dspark.scheduling.step_table import StepTimeTable

_MEMORY = 7  # rounds that a median is over
_LEAST = 3  # rounds that make a measurement: one may be an outlier, the first often is


def _recent() -> deque[float]:
    return deque(maxlen=_MEMORY)


@dataclass(slots=True)
class _Load:
    """Rounds of about the same number of requests."""

    narrow: deque[float] = field(default_factory=_recent)  # measured / table, one row a request
    wide: deque[float] = field(default_factory=_recent)  # the same, steps with drafts
    plain_ms: deque[float] = field(default_factory=_recent)  # of a round beside its step
    draft_ms: deque[float] = field(default_factory=_recent)  # the same, with drafting


class RoundTimes:
    """Predicts rounds of `requests` requests; a round is a step and all since the one before."""

    def __init__(self, table: StepTimeTable) -> None:
        self.table = table
        self._loads: defaultdict[int, _Load] = defaultdict(_Load)  # by powers of two

    def record(
        self, *, requests: int, tokens: int, drafted: bool, step_ms: float, round_ms: float
    ) -> None:
        """A round without prompts took so long."""
        load = self._loads[(requests - 1).bit_length()]
        ratio = step_ms / self.table.ms(requests, tokens)
        (load.wide if tokens > requests else load.narrow).append(ratio)
        (load.draft_ms if drafted else load.plain_ms).append(round_ms - step_ms)

    def drafting_known(self, requests: int) -> bool:
        """Whether rounds with drafting have been measured at this load."""
        return len(self._loads[(requests - 1).bit_length()].draft_ms) >= _LEAST

    def step_ms(self, requests: int, tokens: int) -> float:
        """A step of `tokens` target tokens in all."""
        load = self._loads[(requests - 1).bit_length()]
        # Until a kind of step has been seen, the other kind says more than the bare table.
        first, second = (load.wide, load.narrow) if tokens > requests else (load.narrow, load.wide)
        return self.table.ms(requests, tokens) * median(first or second or (1.0,))

    def plain_ms(self, requests: int) -> float:
        """A round without drafting."""
        load = self._loads[(requests - 1).bit_length()]
        return self.step_ms(requests, requests) + median(load.plain_ms or (0.0,))

    def round_ms(self, requests: int, tokens: int) -> float:
        """A round with drafting, verifying `tokens` - `requests` draft tokens."""
        return self.step_ms(requests, tokens) + self.draft_ms(requests)

    def draft_ms(self, requests: int) -> float:
        """What drafting and all else beside the step take of a round."""
        load = self._loads[(requests - 1).bit_length()]
        return median(load.draft_ms or load.plain_ms or (0.0,))
