"""Step-time tables as tests write them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dspark.scheduling.planner import RoundsMs
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import DoubleArray


def by_count(round_ms: Callable[[DoubleArray], DoubleArray]) -> RoundsMs:
    """Rounds as a planner asks for them, from a law of their target tokens."""
    return lambda least, most: round_ms(np.arange(least, most + 1, dtype=np.float64))


def flat_table(
    requests: tuple[int, ...],
    rows: tuple[int, ...],
    step_ms: tuple[tuple[float, ...], ...],  # [requests][rows]
) -> StepTimeTable:
    """A table by which context costs nothing."""
    return StepTimeTable(requests, rows, (1,), (step_ms,))
