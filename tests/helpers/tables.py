"""Step-time tables as tests write them."""

from __future__ import annotations

from dspark.scheduling.step_table import StepTimeTable


def flat_table(
    requests: tuple[int, ...],
    rows: tuple[int, ...],
    step_ms: tuple[tuple[float, ...], ...],  # [requests][rows]
) -> StepTimeTable:
    """A table by which context costs nothing."""
    return StepTimeTable(requests, rows, (1,), (step_ms,))
