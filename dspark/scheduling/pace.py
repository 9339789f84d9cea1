"""How fast requests finish, and so when somebody who was turned away had better come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0
_MEMORY = 32  # finishes


class Pace:
    """The mean time from one finish to the next over the last of them, rests left out.

    `wait_s` may be called from any thread, all else from one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=_MEMORY)
        self._last = self._clock()

    def resume(self) -> None:
        """Work has come after a rest."""
        self._last = self._clock()

    def finished(self) -> None:
        """A request is over."""
        now = self._clock()
        self._gaps.append(now - self._last)
        self._last = now

    def wait_s(self, finishes: int) -> float:
        """Until so many more have finished, in seconds, within 1 to 60; 1 before any has.

        While nothing finishes, the wait grows.
        """
        gaps = list(self._gaps)  # in one go: the owner's thread goes on meanwhile
        if not gaps:
            return LEAST_WAIT_S
        since = max(0.0, self._clock() - self._last)
        mean = sum(gaps) / len(gaps)
        # The gap that is open counts once it is longer than usual.
        mean = max(mean, (sum(gaps) + since) / (len(gaps) + 1))
        return bounded_wait_s(finishes * mean)


def bounded_wait_s(seconds: float) -> float:
    """A retry time that can be told to a client; what is no number counts as the least."""
    return LEAST_WAIT_S if math.isnan(seconds) else min(MOST_WAIT_S, max(LEAST_WAIT_S, seconds))
