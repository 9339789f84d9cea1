"""How long a verification step takes: T(R, B), R requests in it and B target tokens.

The paper's SPS(B) has one axis. Measured steps need two: with 8 tokens in flight, one request of
eight rows and eight requests of one row differ by a third on a CPU, since every request reads keys
of its own. The table is a grid over requests and rows a request (B / R), profiled at start with
real batches, made monotone (what says that more work takes less time is noise), and interpolated
linearly in between; past its edges the last slope goes on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.errors import ConfigError
from dspark.types import DoubleArray


@dataclass(frozen=True, slots=True)
class StepTimeTable:
    """T(R, B) in milliseconds; `fingerprint` names what it was measured on."""

    requests: tuple[int, ...]
    rows: tuple[int, ...]  # rows a request
    step_ms: tuple[tuple[float, ...], ...]  # [requests][rows]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name, axis in (("requests", self.requests), ("rows", self.rows)):
            if len(axis) < 2 or axis[0] < 1 or list(axis) != sorted(set(axis)):
                raise ConfigError(f"{name} of a step-time table must rise from 1; got {axis}")
        grid = np.asarray(self.step_ms, dtype=np.float64)
        if grid.shape != (len(self.requests), len(self.rows)):
            raise ConfigError(
                f"a step-time table of {len(self.requests)} × {len(self.rows)} needs as many times;"
                f" got {grid.shape}"
            )
        rising = (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
        if not (np.isfinite(grid).all() and (grid > 0).all() and rising):
            raise ConfigError("step times must be positive and never fall along either axis")

    @classmethod
    def from_samples(
        cls, samples: Mapping[tuple[int, int], Sequence[float]], fingerprint: str = ""
    ) -> StepTimeTable:
        """From times by (requests, rows a request), on a full grid: medians, made monotone."""
        requests = sorted({r for r, _ in samples})
        rows = sorted({q for _, q in samples})
        grid = np.array([[float(np.median(samples[r, q])) for q in rows] for r in requests])
        grid = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
        return cls(
            tuple(requests),
            tuple(rows),
            tuple(tuple(map(float, line)) for line in grid),
            fingerprint,
        )

    def ms(self, requests: int, tokens: float) -> float:
        """Time of a step of `requests` requests and `tokens` target tokens in all."""
        i, u = _place(self.requests, requests)
        j, v = _place(self.rows, tokens / max(1, requests))
        low, high = self.step_ms[i], self.step_ms[i + 1]
        at_low = low[j] + v * (low[j + 1] - low[j])
        at_high = high[j] + v * (high[j + 1] - high[j])
        return max(self.step_ms[0][0], at_low + u * (at_high - at_low))

    def times_ms(self, requests: int, tokens: DoubleArray) -> DoubleArray:
        """The same for each of `tokens`, on the edges of cells for all in between."""
        rows = tokens / max(1, requests)
        edges = np.array([*self.rows, max(self.rows[-1] + 1.0, float(rows.max()))])
        times = [self.ms(requests, float(edge) * requests) for edge in edges]
        return np.interp(rows, edges, times)


def _place(axis: tuple[int, ...], x: float) -> tuple[int, float]:
    """The cell that x lies in or is continued from, and how far along it."""
    i = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])
