"""How a verifier's requests do, as running means over its step reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY = 64  # steps
_MOST_SLOW = 16.0  # times a table, or as many times as fast: beyond, the table is of no use


@dataclass(frozen=True, slots=True)
class StepMeans:
    """What a step does for each of its requests."""

    committed: float  # τ, tokens
    rows: float  # target tokens
    context: float  # tokens committed before it
    slow: float = 1.0  # rounds over the table's step times


class RunningMeans:
    """Of the last steps; the first ones count in full."""

    def __init__(self) -> None:
        self._steps = self._rounds = 0
        self._committed = self._rows = self._context = 0.0
        self._log_slow = 0.0

    @property
    def now(self) -> StepMeans | None:
        """None before any step."""
        if not self._steps:
            return None
        return StepMeans(self._committed, self._rows, self._context, math.exp(self._log_slow))

    def add(
        self,
        requests: int,
        committed: int,
        rows: int,
        context: float,  # of a request
        slow: float | None = None,  # None: the step's time does not compare
    ) -> None:
        """A step, with the tokens of all its requests. What cannot be is left out."""
        if not 0 < requests <= committed <= rows:
            return
        self._steps += 1
        self._committed += _toward(self._committed, committed / requests, self._steps)
        self._rows += _toward(self._rows, rows / requests, self._steps)
        self._context += _toward(self._context, context, self._steps)
        if slow is not None and slow > 0.0:
            self._rounds += 1
            log_slow = math.log(min(_MOST_SLOW, max(1.0 / _MOST_SLOW, slow)))
            self._log_slow += _toward(self._log_slow, log_slow, self._rounds)


def _toward(mean: float, value: float, count: int) -> float:
    return (value - mean) / min(count, _MEMORY)
