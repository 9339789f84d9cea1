"""Measuring the step-time table on the machine that will run the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from dspark.engine.judge import Judged, judge
from dspark.kernels.attention_plan import pages_for, plan_attention
from dspark.kernels.cpu import operators
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.draft_gate import lengths
from dspark.scheduling.step_table import Cell, StepTimeTable
from dspark.types import Fence, Request, SamplingParams

_REQUESTS = (2, 4, 8, 16, 32, 64)
_CONTEXTS = (64, 512, 2048)
_PASSES = 3
_BUDGET_S = 20.0  # a start must not take for ever; what is left out is extrapolated
_CHECK_BUDGET_S = 2.0


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: every combination."""

    requests: tuple[int, ...]
    rows: tuple[int, ...]  # rows a request
    contexts: tuple[int, ...]  # committed tokens a request

    @classmethod
    def of(
        cls, target: TargetModel, *, block_size: int, max_requests: int, cache_tokens: int
    ) -> Grid:
        """What an engine of these bounds needs to know.

        Where steps are padded to sizes, all is measured at powers of two, which are sizes.
        """
        most, widest = max(2, max_requests), max(2, block_size + 1)
        # Kernels have steps of their own, and the draft gate compares lengths: no line between.
        rows = {1, *(1 + size for size in lengths(widest - 1))}
        if target.padded is not None:
            most, widest = (1 << (n - 1).bit_length() for n in (most, widest))
            rows = {1, 2, widest // 2, widest}
        longest = max(1, min(target.max_positions, cache_tokens) - widest)
        return cls(
            requests=(1, *(r for r in _REQUESTS if r < most), most),
            rows=tuple(sorted(row for row in rows if row <= widest)),
            contexts=tuple(sorted({min(context, longest) for context in _CONTEXTS})),
        )

    def covers(self, table: StepTimeTable) -> bool:
        """Whether a table is of this grid; of the most requests there may have been no time."""
        few = self.requests[: len(table.requests)]
        return (table.requests, table.rows, table.contexts) == (few, self.rows, self.contexts)

    @property
    def cells(self) -> list[Cell]:
        """Those of few requests first."""
        return [(r, q, c) for r in self.requests for q in self.rows for c in self.contexts]


def profile_steps(
    target: TargetModel,
    kv: PagedKVCache,  # of the engine, before there are requests: their pages are written to
    grid: Grid,
    *,
    fingerprint: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepTimeTable:
    """Time real steps; calls `on_progress(done, total)`.

    Before each step one of a row a request is timed, and it is held against that: where a
    machine's speed moves from one moment to the next, both move. All cells are measured in turn,
    several times. On a machine so slow or busy that this takes long, the largest are left out.
    """
    plain_ms: dict[tuple[int, int], list[float]] = {}  # of one row, by requests and context
    ratios: dict[Cell, list[float]] = {}  # over the one before
    operators.spread_threads()
    started = time.perf_counter()
    total = len(grid.cells) * (1 + _PASSES)
    for done, cell in enumerate(grid.cells * (1 + _PASSES)):
        requests, rows, context = cell
        late = time.perf_counter() - started > _BUDGET_S
        warming_up = done < len(grid.cells)
        measured = {known for known, _, _ in ratios}
        if late and (not warming_up or (requests not in measured and len(measured) >= 2)):
            break
        plain = _step_ms(target, kv, (requests, 1, context))
        took = plain if rows == 1 else _step_ms(target, kv, cell)
        plain_ms.setdefault((requests, context), []).append(plain)
        ratios.setdefault(cell, []).append(took / plain)
        on_progress(done + 1, total)
    warm = min(1, min(map(len, ratios.values())) - 1)  # the first pass, if there was a second
    # Of so many the least is the same machine's for all; at which speed it runs is seen later on.
    least_ms = {of: min(times[warm * len(grid.rows) :]) for of, times in plain_ms.items()}
    return StepTimeTable.from_samples(
        {(r, q, c): [least_ms[r, c] * median(times[warm:])] for (r, q, c), times in ratios.items()},
        padded=_sizes(target, grid),
        fingerprint=fingerprint,
    )


def speed_now(target: TargetModel, kv: PagedKVCache, table: StepTimeTable) -> float:
    """How many times as long as by the table steps take now, from a few small ones."""
    some = table.requests[len(table.requests) // 2]
    cells = [(r, q, table.contexts[0]) for r in (1, some) for q in (1, table.rows[-1])]
    cells.append((some, 1, table.contexts[-1]))
    samples: dict[Cell, list[float]] = {cell: [] for cell in cells}
    operators.spread_threads()
    started = time.perf_counter()
    for done in range(1 + _PASSES):
        if done > 1 and time.perf_counter() - started > _CHECK_BUDGET_S:
            break
        for cell in cells:
            samples[cell].append(_step_ms(target, kv, cell))
    return median(min(times[1:]) / table.ms(r, r * q, c) for (r, q, c), times in samples.items())


def _sizes(target: TargetModel, grid: Grid) -> tuple[int, ...]:
    """What steps are padded to, whatever their context; empty where none are."""
    if target.padded is None or target.padded.failed:
        return ()
    pages = pages_for(grid.contexts[-1] + grid.rows[-1])
    return target.padded.padding.sizes(pages)


def _step_ms(target: TargetModel, kv: PagedKVCache, cell: Cell) -> float:
    """One step, with everything greedy."""
    requests, rows, context = cell
    pages = pages_for(context + rows)
    batch = step_batch(target, requests, rows, context + rows, pages, num_pages=kv.num_pages)
    greedy = SamplingParams(temperature=0.0)
    asked = [
        Judged(Request(str(i), (0,), greedy), Fence(str(i), 0, 0, 1), None, 0)
        for i in range(len(batch.logit_rows))
    ]
    started = time.perf_counter()
    judge(target.forward(batch, kv).logits, asked)
    return (time.perf_counter() - started) * 1e3


def step_batch(
    target: TargetModel,
    requests: int,
    rows: int,
    context: int,
    pages: int,
    *,
    num_pages: int = 0,  # of the cache; requests share pages where it has too few. 0: enough
) -> TargetBatch:
    """A step of `requests` requests, the newest `rows` of `context` positions each."""
    total = requests * rows
    held = np.arange(requests * pages, dtype=np.int32)
    if num_pages:
        held %= num_pages - 1
    return TargetBatch(
        token_ids=torch.arange(total) % target.vocab_size,
        attention=plan_attention(
            list(1 + held.reshape(requests, pages)),
            [context - rows] * requests,
            [rows] * requests,
            target.device,
        ),
        logit_rows=torch.arange(total),
    )
