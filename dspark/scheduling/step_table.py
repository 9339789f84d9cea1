"""How long a verification step takes: T(R, B, C), by requests, target tokens, and their context.

The paper's SPS(B) has one axis. Measured steps need more: with 8 tokens in flight, one request of
eight rows and eight requests of one row differ by a third on a CPU, since every request reads keys
of its own, and the more of them the longer its context is. The table is a grid over requests, rows
a request (B / R) and committed tokens a request (C, a mean), profiled at start with real batches
and made monotone: what says that more work takes less time is noise.

In between it is read linearly, past its edges the last slope goes on, and a context shorter than
the shortest counts as that one. Where steps run in padded shapes (CUDA graphs), time stands still
from one size to the next: B is rounded up to a size first. Then the grid has to be measured at
sizes, or at more tokens than are padded.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import inf, nextafter
from typing import Any

import numpy as np

from dspark.errors import StepTableError
from dspark.types import DoubleArray

MAX_TABLE_BYTES = 1 << 18  # as JSON
_MAX_AXIS = 32  # values on one
_MAX_TOKENS = 1 << 24  # any of them
_MAX_MS = 1e9
_MAX_TEXT = 128
_FAR = float(1 << 20)  # cells past the edge, up to which the last slope goes on

Cell = tuple[int, int, int]  # requests, rows a request, context tokens a request
_Axis = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepTimeTable:
    """T(R, B, C) in milliseconds; StepTableError if a value cannot be."""

    requests: tuple[int, ...]
    rows: tuple[int, ...]  # rows a request
    contexts: tuple[int, ...]  # committed tokens a request, before the step
    step_ms: tuple[tuple[tuple[float, ...], ...], ...]  # [contexts][requests][rows]
    padded: tuple[int, ...] = ()  # target tokens that smaller steps are padded to; beyond, none are
    fingerprint: str = ""  # of what it was measured on
    # With what goes on past the edges: axes, and times on [contexts + 1][requests + 1][rows + 1].
    _edges: tuple[_Axis, ...] = field(init=False, repr=False, compare=False)
    _wide: list[list[list[float]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.fingerprint, str) or len(self.fingerprint) > _MAX_TEXT:
            raise StepTableError(f"a fingerprint is a text of at most {_MAX_TEXT} characters")
        for name, least in (("requests", 2), ("rows", 2), ("contexts", 1), ("padded", 0)):
            axis = getattr(self, name)
            if not (
                isinstance(axis, tuple)
                and least <= len(axis) <= _MAX_AXIS
                and all(type(x) is int and 1 <= x <= _MAX_TOKENS for x in axis)
                and all(a < b for a, b in pairwise(axis))
            ):
                raise StepTableError(
                    f"{name} of a step-time table must be {least} to {_MAX_AXIS} rising numbers "
                    f"from 1 to {_MAX_TOKENS}; got {axis!r:.200}"
                )
        grid = self._checked_grid()
        edges, wide = _continued(grid, (self.contexts, self.requests, self.rows))
        object.__setattr__(self, "_edges", edges)
        object.__setattr__(self, "_wide", wide.tolist())

    def _checked_grid(self) -> DoubleArray:
        shape = len(self.contexts), len(self.requests), len(self.rows)
        try:
            grid = np.array(self.step_ms)
        except ValueError:  # no grid at all
            grid = np.zeros(0)
        if grid.shape != shape or grid.dtype.kind not in "if":
            raise StepTableError(
                f"a step-time table of {' × '.join(map(str, shape))} needs as many times; got "
                f"{grid.dtype} of {grid.shape}"
            )
        rising = all((np.diff(grid, axis=axis) >= 0).all() for axis in range(3))
        if not (rising and ((grid > 0) & (grid <= _MAX_MS)).all()):
            raise StepTableError(
                f"step times must lie above 0 and up to {_MAX_MS:.0f} ms, and never fall along an "
                "axis"
            )
        return grid.astype(np.float64)

    @classmethod
    def from_samples(
        cls,
        samples: Mapping[Cell, Sequence[float]],
        padded: tuple[int, ...] = (),
        fingerprint: str = "",
    ) -> StepTimeTable:
        """From times by cell, on a full grid, made monotone.

        The least of each cell: what disturbs a step only ever makes it longer, and one disturbed
        cell would raise all those above it.
        """
        requests, rows, contexts = (sorted(set(axis)) for axis in zip(*samples, strict=True))
        grid = np.array(
            [[[float(min(samples[r, q, c])) for q in rows] for r in requests] for c in contexts]
        )
        for axis in range(3):
            grid = np.maximum.accumulate(grid, axis=axis)
        axes = tuple(requests), tuple(rows), tuple(contexts)
        return cls(*axes, _tuples(grid.tolist()), padded, fingerprint)

    def at(self, context: float) -> StepTimes:
        """T(R, B) where requests have `context` committed tokens each."""
        contexts, requests, rows = self._edges
        i, u = _place(contexts, context)
        lines = [
            [a + u * (b - a) for a, b in zip(low, high, strict=True)]
            for low, high in zip(self._wide[i], self._wide[i + 1], strict=True)
        ]
        return StepTimes(requests, rows, lines, self.padded)

    def ms(self, requests: int, tokens: float, context: float) -> float:
        """Time of a step of `requests` requests and `tokens` target tokens in all."""
        return self.at(context).ms(requests, tokens)

    def scaled(self, factor: float) -> StepTimeTable:
        """The same on a machine that takes so many times as long."""
        return replace(self, step_ms=_tuples((factor * np.asarray(self.step_ms)).tolist()))

    def check_fits(self, fingerprint: str) -> None:
        """StepTableError if the table was measured on something else."""
        if self.fingerprint != fingerprint:
            raise StepTableError(
                f"this step-time table was measured on {self.fingerprint!r}, not on "
                f"{fingerprint!r}: measure again"
            )

    def to_json(self) -> str:
        """As text, for files and stores."""
        return json.dumps({name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_json(cls, text: str | bytes) -> StepTimeTable:
        """From text that anybody may have written; StepTableError if it is no table."""
        if len(text) > MAX_TABLE_BYTES:
            raise StepTableError(
                f"a step-time table has at most {MAX_TABLE_BYTES} bytes; got {len(text)}"
            )
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StepTableError(f"a step-time table must be JSON: {error}") from error
        if not isinstance(raw, dict) or raw.keys() != set(_NAMES):
            raise StepTableError(
                f"a step-time table is an object of {sorted(_NAMES)}; got "
                f"{sorted(raw) if isinstance(raw, dict) else type(raw).__name__}"
            )
        return cls(**{name: _tuples(value) for name, value in raw.items()})


class StepTimes:
    """T(R, B) at one context: a plane of a table."""

    __slots__ = ("_corners", "_lines", "_padded", "_requests", "_rows")

    def __init__(
        self,
        requests: _Axis,
        rows: _Axis,
        lines: list[list[float]],  # [requests][rows] ms
        padded: tuple[int, ...],
    ) -> None:
        self._requests, self._rows, self._lines, self._padded = requests, rows, lines, padded
        self._corners: dict[int, tuple[list[float], list[float]]] = {}  # by requests

    def ms(self, requests: int, tokens: float) -> float:
        """Time of a step of `requests` requests and `tokens` target tokens in all."""
        if self._padded and tokens <= self._padded[-1]:
            tokens = self._padded[bisect_left(self._padded, tokens)]
        i, u = _place(self._requests, requests)
        j, v = _place(self._rows, tokens / max(1, requests))
        low, high = self._lines[i], self._lines[i + 1]
        at_low = low[j] + v * (low[j + 1] - low[j])
        at_high = high[j] + v * (high[j + 1] - high[j])
        return at_low + u * (at_high - at_low)

    def times_ms(self, requests: int, tokens: DoubleArray) -> DoubleArray:
        """The same for each of `tokens`: found at the edges of cells and sizes, for all between."""
        requests = max(1, requests)
        if requests not in self._corners:
            self._corners[requests] = self._corners_of(requests)
        return np.interp(tokens, *self._corners[requests])

    def _corners_of(self, requests: int) -> tuple[list[float], list[float]]:
        """Tokens between which times lie on lines, and the times there."""
        i, u = _place(self._requests, requests)
        edges = [requests * row for row in self._rows]
        times = [a + u * (b - a) for a, b in zip(self._lines[i], self._lines[i + 1], strict=True)]
        if self._padded and requests <= self._padded[-1]:
            beyond = bisect_right(edges, self._padded[-1])
            stairs, before = [], 0.0
            for size in self._padded[bisect_left(self._padded, requests) :]:
                ms = self.ms(requests, size)
                stairs += [(before, ms), (size, ms)]
                before = nextafter(size, inf)
            edges = [edge for edge, _ in stairs] + edges[beyond:]
            times = [ms for _, ms in stairs] + times[beyond:]
        return edges, times


_NAMES = tuple(f.name for f in fields(StepTimeTable) if f.init)


def _place(axis: _Axis, x: float) -> tuple[int, float]:
    """The cell that x lies in, and how far along it."""
    if x <= axis[0]:
        return 0, 0.0
    i = min(bisect_right(axis, x), len(axis) - 1) - 1
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def _continued(grid: DoubleArray, axes: Sequence[_Axis]) -> tuple[list[_Axis], DoubleArray]:
    """A grid with one more line far past the end of each axis, where its last slope leads.

    Slopes are made monotone like times: those of two neighbours may differ so, by noise alone, that
    going on would make more work take less time.
    """
    edges = []
    for n, axis in enumerate(axes):
        width = axis[-1] - axis[-2] if len(axis) > 1 else 1
        edges.append((*axis, axis[-1] + _FAR * width))
        last = grid.take([-1], n)
        slope = last - grid.take([-2], n) if len(axis) > 1 else np.zeros_like(last)
        for other in {0, 1, 2} - {n}:
            slope = np.maximum.accumulate(slope, axis=other)
        grid = np.concatenate([grid, last + _FAR * slope], axis=n)
    return edges, grid


def _tuples(value: Any) -> Any:
    """Lists as the tuples that fields hold."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
