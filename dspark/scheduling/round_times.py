"""How long rounds really take: the step-time table, corrected by what was lately measured.

A table is made once, on a machine that did nothing else. What steps take later differs by tens of
percent, and what drafting adds to a round (waiting, features, the planner itself) is in no table.
Both are followed here for each size of load, as running medians: one step that the operating system
interrupted says nothing about the next.

Much of what differs is the machine's speed, which changes by the second where others share it, and
for all kinds of rounds alike. It is followed apart from the rest, over the last few steps, whatever
their kind; all else is remembered relative to it. So rounds with and without drafting, of which
only one kind is run at a time, can be compared although the machine has changed in between.

Where blocks take long to come, a round may be run as two: each half of the requests is stepped
while the other half is drafted for. That pays when the wait that it hides is longer than what two
small steps take more than one large step.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from dspark.scheduling.step_table import StepTimeTable

_MEMORY = 15  # rounds that a median is over
_SPEED_MEMORY = 5  # steps; a change of speed must be known before the other medians follow it
_FIXED_SHARE = 0.5  # of drafting, that a shorter block is not expected to save
_LEAST = 3  # rounds that make a measurement: one may be an outlier, the first often is


def _recent() -> deque[float]:
    return deque(maxlen=_MEMORY)


@dataclass(slots=True)
class _Load:
    """Rounds of about the same number of requests."""

    # All relative to the machine's speed.
    narrow: deque[float] = field(default_factory=_recent)  # measured / table, one row a request
    wide: deque[float] = field(default_factory=_recent)  # the same, steps with drafts
    plain_ms: deque[float] = field(default_factory=_recent)  # of a round beside its step
    draft_ms: defaultdict[int, deque[float]] = field(  # the same, with blocks of so many tokens
        default_factory=lambda: defaultdict(_recent)
    )
    wait_ms: deque[float] = field(default_factory=_recent)  # for blocks, with nothing else to do


class RoundTimes:
    """Predicts rounds of `requests` requests; a round is a step and all since the one before."""

    def __init__(self, table: StepTimeTable) -> None:
        self.table = table
        self._loads: defaultdict[int, _Load] = defaultdict(_Load)  # by powers of two
        self._slowness: deque[float] = deque(maxlen=_SPEED_MEMORY)  # measured / expected

    def record(
        self,
        *,
        requests: int,
        tokens: int,
        drafted: int,  # length of the blocks that were asked for; 0: none
        step_ms: float,
        round_ms: float,
        waited_ms: float = 0.0,  # of the round, for blocks
        overlapped: bool = False,  # other requests were drafted for meanwhile
    ) -> None:
        """A round without prompts took so long."""
        load, wide = self._at(requests), tokens > requests
        ratio = step_ms / self.table.ms(requests, tokens)
        self._slowness.append(ratio / self._correction(requests, wide))
        slow = self._slow()
        (load.wide if wide else load.narrow).append(ratio / slow)
        beside = load.draft_ms[drafted] if drafted else load.plain_ms
        beside.append((round_ms - step_ms - waited_ms) / slow)
        if drafted and not overlapped:
            load.wait_ms.append(waited_ms / slow)

    def drafting_known(self, requests: int) -> bool:
        """Whether rounds with drafting have been measured at this load."""
        return any(len(times) >= _LEAST for times in self._at(requests).draft_ms.values())

    def step_ms(self, requests: int, tokens: int) -> float:
        """A step of `tokens` target tokens in all."""
        correction = self._correction(requests, tokens > requests)
        return self.table.ms(requests, tokens) * correction * self._slow()

    def plain_ms(self, requests: int) -> float:
        """A round without drafting."""
        beside = median(self._at(requests).plain_ms or (0.0,))
        return self.step_ms(requests, requests) + beside * self._slow()

    def draft_ms(self, requests: int, size: int, *, waits: bool = True) -> float:
        """What drafting blocks of `size`, and all else beside the step, take of a round."""
        load = self._at(requests)
        wait = median(load.wait_ms or (0.0,)) if waits else 0.0
        return (self._beside_ms(load, size) + wait) * self._slow()

    def curve(
        self, requests: int, size: int, *, waits: bool = True
    ) -> Callable[[int], float]:  # target tokens -> ms
        """Rounds with blocks of `size`, by the target tokens in their step."""
        beside = self.draft_ms(requests, size, waits=waits)
        slow, table_ms = self._slow(), self.table.ms
        narrow, wide = (slow * self._correction(requests, wide) for wide in (False, True))

        def round_ms(tokens: int) -> float:
            return table_ms(requests, tokens) * (wide if tokens > requests else narrow) + beside

        return round_ms

    def overlapped_ms(self, requests: int, tokens: int, size: int, latency_ms: float) -> float:
        """A round with drafting as two halves; blocks come `latency_ms` after they are asked for.

        Infinite where there is nothing to halve.
        """
        if requests < 2:
            return math.inf
        half = (requests + 1) // 2
        other = requests - half
        first = self.curve(half, size, waits=False)(round(tokens * half / requests))
        second = self.curve(other, size, waits=False)(round(tokens * other / requests))
        return max(first + second, latency_ms + max(first, second))

    def merging_saves_ms(self, here: tuple[int, int], there: tuple[int, int]) -> float:
        """What one step takes less than two, each given by its (requests, tokens)."""
        merged = self.step_ms(here[0] + there[0], here[1] + there[1])
        return self.step_ms(*here) + self.step_ms(*there) - merged

    def _slow(self) -> float:
        """Steps of late over what is usual."""
        return median(self._slowness or (1.0,))

    def _correction(self, requests: int, wide: bool) -> float:
        """Usual over table. Until a kind of step has been seen, the other says more than 1."""
        load = self._at(requests)
        first, second = (load.wide, load.narrow) if wide else (load.narrow, load.wide)
        return median(first or second or (1.0,))

    def _beside_ms(self, load: _Load, size: int) -> float:
        """As measured, or on the line through what was: drafting has a part that no length saves.

        Short blocks are thought cheap, so that they are tried.
        """
        known = {s: median(times) for s, times in load.draft_ms.items() if len(times) >= _LEAST}
        if size in known:
            return known[size]
        plain = median(load.plain_ms or (0.0,))
        if not known:
            latest = [time for times in load.draft_ms.values() for time in times]
            return median(latest or (plain,))
        sizes = sorted(known)
        nothing = plain + _FIXED_SHARE * max(0.0, known[sizes[0]] - plain)
        return float(np.interp(size, [0, *sizes], [nothing, *(known[s] for s in sizes)]))

    def _at(self, requests: int) -> _Load:
        return self._loads[(requests - 1).bit_length()]
