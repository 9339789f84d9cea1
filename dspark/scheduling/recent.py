"""The latest values of something, and their median."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Recent:
    """Up to `memory` values. One that an operating system interrupted says nothing of the next."""

    __slots__ = ("_memory", "_rising", "_values", "usual")

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._values: deque[float] = deque()
        self._rising: list[float] = []  # the same
        self.usual: float | None = None

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> bool:
        """Whether the median is another now."""
        before, rising = self.usual, self._rising
        if len(self._values) == self._memory:
            del rising[bisect_left(rising, self._values.popleft())]
        self._values.append(value)
        insort(rising, value)
        half = len(rising) // 2
        self.usual = rising[half] if len(rising) % 2 else 0.5 * (rising[half - 1] + rising[half])
        return self.usual != before
