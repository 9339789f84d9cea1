"""Steps in padded shapes, captured as CUDA graphs and replayed (paper §5.3).

Up to some hundred rows, a step costs a GPU less than launching its kernels costs the host. So every
row is made a sequence of its own, rows and pages are padded to a few sizes, and the forward of a
target, or of a drafter's block, is captured once for each size that occurs: what comes in lies in
static buffers, filled by one copy.

Where nothing can be captured the same padded step runs as it is, which is how it is tested.

Symbols as in dspark.models.target, T and W being padded; W pages a row.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from dspark.kernels.attention_plan import (
    FEW_ROWS,
    PAGE_SIZE,
    TILE_ROWS,
    AttentionPlan,
    RowPlan,
    cut_into_tiles,
    plan_attention,
)
from dspark.kernels.transfer import Packing
from dspark.models.capture import Capture
from dspark.models.kv_cache import NOWHERE, PagedKVCache

log = logging.getLogger(__name__)

_MOST_GRAPHS = 128  # of one cache: all sizes at six widths. The least recently used goes

Shape = tuple[int, int]  # T, W
Kind = tuple[int, int, int | None]  # T, W, and the plan's window
Output = tuple[torch.Tensor, torch.Tensor | None]  # of asked rows [N, V or d], and taps [T, m·d]
# A model's forward: token ids [T], their plan, rows that are asked for [N], the cache.
Forward = Callable[[torch.Tensor, RowPlan, torch.Tensor, PagedKVCache], Output]


@dataclass(frozen=True, slots=True)
class Padding:
    """The shapes that steps are padded to; a step that none holds is better run as it is."""

    rows: tuple[int, ...]  # rising
    most_keys: int  # of all rows
    least_width: int  # pages of each
    prompts: bool  # whether rows may be a prompt's, which many have the keys of

    def shape(self, plan: AttentionPlan) -> Shape | None:
        """That of a step; None if none holds it."""
        rows, width = len(plan.reach), self._width(plan.tables.shape[1])
        if rows > self.rows[-1] or (max(plan.row_counts) > FEW_ROWS and not self.prompts):
            return None
        rows = next(size for size in self.rows if size >= rows)
        return (rows, width) if rows * width * PAGE_SIZE <= self.most_keys else None

    def sizes(self, width: int) -> tuple[int, ...]:
        """What rows are padded to where the longest sequence has `width` pages."""
        most = self.most_keys // (self._width(width) * PAGE_SIZE)
        return tuple(rows for rows in self.rows if rows <= most)

    def _width(self, width: int) -> int:
        return max(self.least_width, 1 << (width - 1).bit_length())


_FEW = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Attention that copies the keys of each row: beyond these, copying takes longer than launches.
GATHERING = Padding(_FEW, 1 << 16, 1, prompts=False)
# Kernels that read keys where they lie are bounded by the tables that a step takes over. They are
# told of 512 keys at least, one program's: every width is a graph more to capture while others
# wait. A family's own modules make logits of every row, and of more than these that is a waste.
MODULES = Padding(_FEW, 1 << 22, 32, prompts=True)
# An 8B target's step of 512 rows takes an H100 about as long as it takes a host to launch.
KERNELS = Padding((*_FEW, 320, 384, 448, 512, 640, 768, 896, 1024), 1 << 22, 32, prompts=True)


class PaddedSteps:
    """The padded steps of one model, over any number of caches."""

    def __init__(
        self, forward: Forward, device: torch.device, *, capture: bool, padding: Padding
    ) -> None:
        """`capture`: whether graphs are made; `device` must be a CUDA device then."""
        self._forward = forward
        self.padding = padding
        self._device = device
        self._capture = Capture(device) if capture else None
        self._caches: WeakKeyDictionary[PagedKVCache, _Captured] = WeakKeyDictionary()
        self._asked: torch.Tensor | None = None  # [most rows, V or d] what graphs write, and taps
        self._taps: torch.Tensor | None = None  # [most rows, m·d]
        self.failed = False  # a capture did; steps run as they are from then on

    def graphs(self, kv: PagedKVCache) -> int:
        """Graphs that are held for a cache."""
        made = self._caches.get(kv)
        return 0 if made is None else len(made.steps)

    def warm_up(self, kv: PagedKVCache, most_rows: int, *, window: int | None = None) -> None:
        """Capture the steps of up to so many rows over few pages before anybody waits for them.

        `kv` is written to. The largest come first: the others find room in their memory.
        """
        page = np.ones(1, dtype=np.int32)
        sizes = self.padding.sizes(1)
        needed = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most_rows]
        for rows in reversed(needed):
            plan = plan_attention(
                [page] * rows, [0] * rows, [1] * rows, self._device, window=window
            )
            self.run(torch.zeros(rows, dtype=torch.int64), plan, torch.arange(rows), kv)

    def run(
        self,
        token_ids: torch.Tensor,  # [T] int64, on the host
        plan: AttentionPlan,
        asked_rows: torch.Tensor,  # [N] int64, on the host
        kv: PagedKVCache,
    ) -> Output | None:
        """The step's output, or None if it is not one for padding."""
        shape = self.padding.shape(plan)
        # A graph knows where the cache lies: its memory must be there before.
        if shape is None or self.failed or not kv.allocated:
            return None
        held = self._caches.setdefault(kv, _Captured())
        kind = (*shape, plan.window)
        step = held.steps.get(kind)
        if step is None:
            step = _Step(shape, plan.window, self._device)
        step.fill(token_ids, plan, asked_rows)
        if kind not in held.steps:
            if self._capture is not None and not self._captured(step, self._capture, kv, held):
                return None
            held.steps[kind] = step
            if len(held.steps) > _MOST_GRAPHS:
                held.steps.popitem(last=False)
        held.steps.move_to_end(kind)
        if step.graph is None:
            self._write(step, kv)
        else:
            step.graph.replay()
        return self._taken(step, len(token_ids), len(asked_rows))

    def _taken(self, step: _Step, rows: int, wanted: int) -> Output:
        """Copies, since the next step writes to the same buffers."""
        assert self._asked is not None
        asked = self._asked[:rows]
        asked = asked.clone() if wanted == rows else asked[step.asked_rows[:wanted]]
        return asked, None if self._taps is None else self._taps[:rows].clone()

    def _write(self, step: _Step, kv: PagedKVCache) -> None:
        """Run the step on what its buffers hold; its output goes to the shared ones."""
        # A new plan each time: what kernels derive from one must not outlive a capture.
        plan = RowPlan(
            step.positions, step.reach, step.slots, step.tables, step.tile_rows, step.window
        )
        asked, taps = self._forward(step.token_ids, plan, step.every_row, kv)
        rows, most = len(asked), self.padding.rows[-1]
        if self._asked is None:
            self._asked = asked.new_empty(most, asked.shape[1])
            self._taps = None if taps is None else taps.new_empty(most, taps.shape[1])
        self._asked[:rows].copy_(asked)
        if self._taps is not None and taps is not None:
            self._taps[:rows].copy_(taps)

    def _captured(self, step: _Step, capture: Capture, kv: PagedKVCache, held: _Captured) -> bool:
        """Capture a step whose buffers are filled; False, for good, if that cannot be done."""
        started = time.perf_counter()
        if held.pool is None:
            held.pool = torch.cuda.graph_pool_handle()
        try:
            step.graph = capture(lambda: self._write(step, kv), held.pool)
        except RuntimeError as error:
            self.failed = True
            self._caches.clear()
            log.warning("steps are not captured, and cost more to launch: %s", error)
            return False
        log.info(
            "captured a step of %d rows over %d pages in %.0f ms (%d before it)",
            *step.shape, (time.perf_counter() - started) * 1e3, len(held.steps),
        )  # fmt: skip
        return True


class _Step:
    """The static inputs of one shape, and its graph."""

    def __init__(self, shape: Shape, window: int | None, device: torch.device) -> None:
        self.shape, self.window = shape, window
        self.graph: torch.cuda.CUDAGraph | None = None
        rows, width = shape
        lines = torch.zeros(5, rows, dtype=torch.int64)
        # Padding: a row that reads the zeros of slot 0 alone, and is written where nobody reads.
        lines[3] = NOWHERE
        tile_rows = torch.ones(rows, dtype=torch.int32)
        padding = [*lines, tile_rows, torch.zeros(rows, width, dtype=torch.int32)]
        self._packing = Packing(padding)
        self._padding = self._packing.fill(self._packing.buffer("cpu"), padding)
        self._buffer = self._packing.buffer(device)
        views = self._packing.views(self._buffer)
        self.token_ids, self.positions, self.reach, self.slots, self.asked_rows = views[:5]
        self.tile_rows, self.tables = views[5:]
        self.every_row = torch.arange(rows, device=device)

    def fill(self, token_ids: torch.Tensor, plan: AttentionPlan, asked_rows: torch.Tensor) -> None:
        """Take in a step that fits, in one copy."""
        staged = self._packing.buffer("cpu", pinned=self._buffer.device.type == "cuda")
        staged.copy_(self._padding)
        *lines, tile_rows, tables = self._packing.views(staged)
        given = (token_ids, plan.positions, plan.reach, plan.slots, asked_rows)
        for line, values in zip(lines, given, strict=True):
            line[: len(values)] = values
        counts = np.asarray(plan.row_counts)
        of = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        tables[: len(of), : plan.tables.shape[1]] = plan.tables[of]
        first, rows, _ = cut_into_tiles(counts, np.arange(len(counts)), TILE_ROWS)
        tile_rows[: len(of)] = 0
        tile_rows[torch.from_numpy(first).long()] = torch.from_numpy(rows)
        self._buffer.copy_(staged, non_blocking=True)


@dataclass(slots=True)
class _Captured:
    """What is held for one cache, least recently used first; its graphs share their memory."""

    steps: OrderedDict[Kind, _Step] = field(default_factory=OrderedDict)
    pool: Any = None  # torch's handle of that memory
