"""What drafting adds to rounds, by the length of blocks.

A host that others share changes its speed by the second, and one length of blocks is in use for
minutes while others have a round now and then: held against each other as they were measured, the
length wins that had the better moment. So what is usual is followed over the latest rounds of all
lengths, and what one length takes more than another is learnt only where they meet within a few
rounds, by holding the rarer against the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from itertools import pairwise
from statistics import median

import numpy as np

from dspark.scheduling.recent import Recent

_USUAL_MEMORY = 7  # rounds
_MORE_MEMORY = 7  # meetings, each at another moment
_NEAR = 8  # rounds within which lengths meet
_FIXED_SHARE = 0.5  # of drafting, that a shorter block is not expected to save
LEAST = 3  # rounds that make a measurement: one may be an outlier, the first often is


class LengthTimes:
    """Of one load."""

    def __init__(self) -> None:
        self._usual = Recent(_USUAL_MEMORY)  # ms, but for what a round's length takes more
        self._more: defaultdict[int, Recent] = defaultdict(lambda: Recent(_MORE_MEMORY))
        self._rounds: Counter[int] = Counter()  # by length
        self._latest: deque[tuple[int, int, float]] = deque(maxlen=_NEAR)  # round, length, ms

    def add(self, at: int, length: int, ms: float) -> None:
        """Round number `at` had blocks of `length` draft tokens, and took `ms` beside its step."""
        near = [(other, took) for when, other, took in self._latest if at - when <= _NEAR]
        others = [took - self._more_ms(other) for other, took in near if other != length]
        if others and 2 * len(others) >= len(near):
            self._more[length].add(ms - median(others))
        elif not self._rounds[length]:
            self._more[length].add(0.0 if self._usual.usual is None else ms - self._usual.usual)
        self._usual.add(ms - self._more_ms(length))
        self._rounds[length] += 1
        self._latest.append((at, length, ms))

    def _more_ms(self, length: int) -> float:
        return self._more[length].usual or 0.0

    @property
    def known(self) -> bool:
        """Whether some length has been measured."""
        return any(rounds >= LEAST for rounds in self._rounds.values())

    def knows(self, length: int) -> bool:
        """Whether this one has."""
        return self._rounds[length] >= LEAST

    def usual_ms(self, length: int, plain_ms: float) -> float | None:
        """As measured, or on the line through what was: drafting has a part that no length saves.

        Short blocks are thought cheap, so that they are tried. `plain_ms`: without any block.
        """
        usual = self._usual.usual
        lengths = sorted(one for one, rounds in self._rounds.items() if rounds >= LEAST)
        if usual is None or not lengths:
            return None
        known = {one: usual + self._more_ms(one) for one in lengths}
        # No block takes longer than a longer one: if it seems so, it was timed at an odd moment.
        for longer, shorter in pairwise(lengths[::-1]):
            known[shorter] = min(known[shorter], known[longer])
        if length in known:
            return known[length]
        nothing = plain_ms + _FIXED_SHARE * max(0.0, known[lengths[0]] - plain_ms)
        return float(np.interp(length, [0, *lengths], [nothing, *(known[one] for one in lengths)]))
