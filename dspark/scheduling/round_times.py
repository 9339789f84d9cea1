"""How long rounds really take: the step-time table, corrected by what was lately measured.

A table is made once, on a machine that did nothing else. What steps take later differs by tens of
percent, and what drafting adds to a round (waiting, features, the planner itself) is in no table.
Both are followed here for each size of load, as running medians: one step that the operating system
interrupted says nothing about the next.

Much of what differs is the machine's speed, which changes by the second where others share it, and
for all kinds of steps alike. It is followed over the last few steps, whatever their kind. How kinds
compare, steps with drafts with those without and one load with another, is learnt only where they
meet within a few steps, by holding the rarer against the other; while one kind is run alone, there
is nothing to learn, and what it might seem to teach would be noise that adds up.

A load that has not been seen is judged by its neighbours: in between on the line between them,
beyond in proportion. A larger load is so thought worse for drafting than it may be, and a smaller
one better.

Steps that prompts take part in say little of others, since the table knows no prompts: they count
as so many more rows. Where there are no other steps, as many short answers bring it about, the
machine's speed is taken from them, and those with drafts are held against those without all the
same.

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
from typing import NamedTuple

import numpy as np

from dspark.scheduling.length_times import LEAST, LengthTimes
from dspark.scheduling.recent import Recent
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import DoubleArray

_MEMORY = 15  # rounds that a median is over
_SPEED_MEMORY = 5  # steps; a change of speed must be known before the other medians follow it
_NEAR = 8  # steps within which kinds meet
# Between the table's errors at one load and at the next: a load's first steps load kernels, too.
_MOST_APART = 1.5
_KNOWN = 8  # rounds that times may be old, where they are asked for each round
_GRAIN = 32.0  # tokens of context, by which it must change to make a difference


def _recent() -> Recent:
    return Recent(_MEMORY)


def load_of(requests: int) -> int:
    """Names the size of load that `requests` belong to; times are remembered by it."""
    return (requests - 1).bit_length()


class _Step(NamedTuple):
    requests: int
    load: int
    rows: float  # a request
    wide: bool  # with drafts
    ratio: float  # measured / table


class _Correction(NamedTuple):
    """Usual times over the table's: `level` at one row a request, then on a line to what is usual
    with drafts.

    A jump where the first draft token is verified would be the table's error at one row or the
    other, and would keep any from being verified.
    """

    level: float
    widening: float
    wide_rows: float

    def at(self, rows: float) -> float:
        share = min(1.0, (rows - 1.0) / (self.wide_rows - 1.0))
        return self.level * (1.0 + share * (self.widening - 1.0))

    def line(self, rows: DoubleArray) -> DoubleArray:
        return self.level * np.interp(rows, (1.0, self.wide_rows), (1.0, self.widening))


@dataclass(slots=True)
class _Load:
    """Rounds of about the same number of requests. Times are relative to the machine's speed."""

    level: Recent = field(default_factory=_recent)  # the table's error, against other loads
    widening: Recent = field(default_factory=_recent)  # the same, wide against narrow steps
    widening_with_prompts: Recent = field(default_factory=_recent)  # of steps with prompts in them
    wide_rows: Recent = field(default_factory=_recent)  # rows a request in wide steps
    plain_ms: Recent = field(default_factory=_recent)  # of a round beside its step
    drafting: LengthTimes = field(default_factory=LengthTimes)  # the same, with blocks
    few_ms: Recent = field(default_factory=_recent)  # the same, with blocks for a few requests
    wait_ms: Recent = field(default_factory=_recent)  # for blocks, with nothing else to do

    @property
    def usual_widening(self) -> float | None:
        if self.widening.usual is not None:
            return self.widening.usual
        return self.widening_with_prompts.usual

    @property
    def usual_plain_ms(self) -> float | None:
        return self.plain_ms.usual if len(self.plain_ms) >= LEAST else None

    def usual_draft_ms(self, size: int) -> float | None:
        return self.drafting.usual_ms(size, self.usual_plain_ms or 0.0)


class RoundTimes:
    """Predicts rounds of `requests` requests; a round is a step and all since the one before.

    All is for the context that was set last.
    """

    def __init__(self, table: StepTimeTable) -> None:
        self.table = table
        self._context, self._now = 0.0, table.at(0.0)
        self._loads: defaultdict[int, _Load] = defaultdict(_Load)  # by powers of two
        self._steps: deque[_Step] = deque(maxlen=_NEAR)  # without prompts
        self._prompt_steps: deque[_Step] = deque(maxlen=_NEAR)
        self._prompts_in_a_row = 0  # steps with them
        self._slow = 1.0  # steps of late over what is usual
        self._drafted, self._in_a_row = 0, 0  # the last rounds
        self._corrections: dict[int, _Correction] = {}  # by requests, as far as known
        # By requests, block size, and whether blocks are waited for; from `requests` tokens on.
        self._known_rounds: dict[tuple[int, int, bool], DoubleArray] = {}
        self._age = 0  # of the oldest of them, in rounds
        self._recorded = 0  # rounds, since the start

    def set_context(self, tokens: float) -> None:
        """Requests have so many committed tokens each, on the average."""
        if abs(tokens - self._context) >= _GRAIN:
            self._context, self._now = tokens, self.table.at(tokens)
            self._known_rounds.clear()

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
        prefill: int = 0,  # of the tokens, those of prompts
    ) -> None:
        """A round took so long.

        The first after a change between drafting and none, or of the blocks' length, is left out,
        since it pays for that.
        """
        self._recorded += 1
        self._age += 1
        if self._age >= _KNOWN:
            self._age = 0
            self._known_rounds.clear()
        if drafted != self._drafted:
            settled, self._drafted, self._in_a_row = self._in_a_row > 1, drafted, 1
            if settled:
                return
        else:
            self._in_a_row += 1
        load = self._at(requests)
        self._take_in(load, requests, tokens, prefill, step_ms)
        beside_ms = (round_ms - step_ms - waited_ms) / self._slow
        if drafted:
            load.drafting.add(self._recorded, drafted, beside_ms)
        else:
            load.plain_ms.add(beside_ms)
        if drafted and not overlapped:
            load.wait_ms.add(waited_ms / self._slow)

    def record_few(self, requests: int, beside_ms: float) -> None:
        """A round had blocks for a few of its requests, and took so long beside its step."""
        self._at(requests).few_ms.add(beside_ms / self._slow)

    def _take_in(
        self, load: _Load, requests: int, tokens: int, prefill: int, step_ms: float
    ) -> None:
        rows, ratio = (tokens - prefill) / requests, step_ms / self._now.ms(requests, tokens)
        step = _Step(requests, load_of(requests), rows, rows > 1.0, ratio)
        if step.wide and load.wide_rows.add(step.rows):
            self._corrections.clear()
        if prefill:
            self._hold_against(step, self._prompt_steps, load.widening_with_prompts)
            self._prompt_steps.append(step)
            self._prompts_in_a_row += 1
            if self._prompts_in_a_row > _NEAR:
                self._follow_speed(self._prompt_steps)
            return
        self._prompts_in_a_row = 0
        self._hold_against(step, self._steps, load.widening)
        self._learn_level(step, load)
        self._steps.append(step)
        self._follow_speed(self._steps)

    def _follow_speed(self, steps: deque[_Step]) -> None:
        self._slow = median(self._usual_ratios(list(steps)[-_SPEED_MEMORY:]))

    @property
    def drafting_known(self) -> bool:
        """Whether rounds with drafting have been measured, at whatever load."""
        return any(load.drafting.known for load in self._loads.values())

    def knows_drafting(self, requests: int) -> bool:
        """Whether they have been at this load."""
        return self._at(requests).drafting.known

    def knows_length(self, requests: int, size: int) -> bool:
        """Whether rounds with blocks of `size` have been, at this load."""
        return self._at(requests).drafting.knows(size)

    def step_ms(self, requests: int, tokens: float) -> float:
        """A step of `tokens` target tokens in all."""
        correction = self._correction(requests).at(tokens / max(1, requests))
        return self._now.ms(requests, tokens) * correction * self._slow

    def plain_ms(self, requests: int) -> float:
        """A round without drafting."""
        # Beyond what is known not in proportion: much of it is the same for one request and for
        # many, and rounds without drafts that are thought dear make drafting look cheap.
        beside = self._of(requests, lambda load: load.usual_plain_ms, grows=False)
        return self.step_ms(requests, requests) + beside * self._slow

    def few_ms(self, requests: int) -> float | None:
        """What blocks for a few of so many requests add to a round; None: not measured."""
        load = self._at(requests)
        if load.few_ms.usual is None:
            return None
        return max(0.0, load.few_ms.usual - (load.usual_plain_ms or 0.0)) * self._slow

    def draft_ms(
        self, requests: int, size: int, *, waits: bool = True, grows: bool = True
    ) -> float:
        """What drafting blocks of `size`, and all else beside the step, take of a round.

        `grows`: as steps do, beyond what is known; else it is thought the same for any load.
        """
        beside = self._of(requests, lambda load: load.usual_draft_ms(size), grows=grows)
        wait = self._of(requests, lambda load: load.wait_ms.usual, grows=grows) if waits else 0.0
        return (beside + wait) * self._slow

    def round_ms(
        self,
        requests: int,
        tokens: DoubleArray,
        size: int,
        *,
        waits: bool = True,
        grows: bool = True,
    ) -> DoubleArray:
        """Rounds with blocks of `size`, by the target tokens in their step."""
        correction, rows = self._correction(requests), tokens / max(1, requests)
        steps_ms = self._now.times_ms(requests, tokens) * correction.line(rows)
        return steps_ms * self._slow + self.draft_ms(requests, size, waits=waits, grows=grows)

    def rounds_ms(
        self, requests: int, least: int, most: int, size: int, *, waits: bool = True
    ) -> DoubleArray:  # [1 + most - least], read only
        """The same of `least`, …, `most` target tokens, by what was known a few rounds ago.

        For those who ask each round: little changes from one to the next.
        """
        kind = requests, size, waits
        known = self._known_rounds.get(kind)
        if known is None or len(known) <= most - requests:
            tokens = requests + np.arange(1 << (most - requests + 1).bit_length(), dtype=np.float64)
            known = self._known_rounds[kind] = self.round_ms(requests, tokens, size, waits=waits)
        return known[least - requests : 1 + most - requests]

    def overlapped_ms(self, requests: int, tokens: float, size: int, latency_ms: float) -> float:
        """A round with drafting as two halves; blocks come `latency_ms` after they are asked for.

        Infinite where there is nothing to halve.
        """
        if requests < 2:
            return math.inf
        half = (requests + 1) // 2
        first, second = (
            self.step_ms(r, tokens * r / requests) + self.draft_ms(r, size, waits=False)
            for r in (half, requests - half)
        )
        return max(first + second, latency_ms + max(first, second))

    def merging_saves_ms(self, here: tuple[int, int], there: tuple[int, int]) -> float:
        """What one step takes less than two, each given by its (requests, tokens)."""
        merged = self.step_ms(here[0] + there[0], here[1] + there[1])
        return self.step_ms(*here) + self.step_ms(*there) - merged

    def _hold_against(self, step: _Step, near: deque[_Step], widening: Recent) -> None:
        """Learn how wide steps compare with narrow ones, where this one is the rarer."""
        here = [other for other in near if other.load == step.load]
        others = [other.ratio for other in here if other.wide != step.wide]
        if others and 2 * len(others) >= len(here):
            base = median(others)
            widening.add(step.ratio / base if step.wide else base / step.ratio)
            self._corrections.clear()

    def _learn_level(self, step: _Step, load: _Load) -> None:
        """Learn how this load compares with others that were near."""
        elsewhere = [near for near in self._steps if near.load != step.load]
        here = len(self._steps) - len(elsewhere)
        if not load.level or (elsewhere and len(elsewhere) >= here):
            (own,) = self._usual_ratios([step])
            base = median(self._usual_ratios(elsewhere) or (1.0,))
            level = own * self._correction(step.requests).level / base
            near = self._nearest_level(step.load)
            if near is not None:
                level = min(max(level, near / _MOST_APART), near * _MOST_APART)
            load.level.add(level)
            self._corrections.clear()

    def _nearest_level(self, name: int) -> float | None:
        """Of the load that is nearest to this one and known."""
        levels = {other: load.level.usual for other, load in self._loads.items() if load.level}
        levels.pop(name, None)
        return levels[min(levels, key=lambda other: abs(other - name))] if levels else None

    def _usual_ratios(self, steps: list[_Step]) -> list[float]:
        """Measured over usual."""
        return [step.ratio / self._correction(step.requests).at(step.rows) for step in steps]

    def _correction(self, requests: int) -> _Correction:
        known = self._corrections.get(requests)
        if known is None:
            known = self._corrections[requests] = _Correction(
                self._nearest(requests, lambda load: load.level.usual, 1.0),
                self._nearest(requests, lambda load: load.usual_widening, 1.0),
                self._nearest(requests, lambda load: load.wide_rows.usual, 2.0),
            )
        return known

    def _nearest(
        self, requests: int, value: Callable[[_Load], float | None], default: float
    ) -> float:
        own = value(self._at(requests))
        if own is not None:
            return own
        known = self._known(value)
        return known[min(known, key=lambda r: abs(r - requests))] if known else default

    def _of(
        self, requests: int, time_ms: Callable[[_Load], float | None], *, grows: bool = True
    ) -> float:
        """A time at this load, or what its neighbours make of it; 0 where no load knows.

        `grows`: with requests, beyond the largest load that knows.
        """
        own = time_ms(self._at(requests))
        if own is not None:
            return own
        known = self._known(time_ms)
        if not known:
            return 0.0
        loads = sorted(known)
        nearest = min(max(requests, loads[0]), loads[-1])
        within = float(np.interp(nearest, loads, [known[r] for r in loads]))
        if not grows or requests <= nearest:
            return within * min(requests, nearest) / nearest
        # As whole blocks' steps grow: in proportion on a CPU, hardly at all on a GPU.
        rows = self.table.rows[-1]
        steps_ms = [self._now.ms(n, n * rows) for n in (nearest, requests)]
        return within * steps_ms[1] / steps_ms[0]

    def _known(self, value: Callable[[_Load], float | None]) -> dict[int, float]:
        """By the largest number of requests of a load."""
        known = {1 << name: value(load) for name, load in self._loads.items()}
        return {requests: found for requests, found in known.items() if found is not None}

    def _at(self, requests: int) -> _Load:
        return self._loads[load_of(requests)]
