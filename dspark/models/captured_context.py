"""Context written in padded shapes, captured as CUDA graphs and replayed (paper §5.3).

What a round commits is a few rows a session, and writing them two small kernels a layer: launching
those costs more than they do. So rows are padded to a few sizes, and the writing is captured once
for each that occurs: what comes in lies in static buffers.

Where nothing can be captured the same padded rows are written as they are, which is how it is
tested.

Symbols: N rows, padded; d width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dspark.kernels.transfer import Packing
from dspark.models.capture import Capture
from dspark.models.graphs import KERNELS
from dspark.models.kv_cache import NOWHERE, PagedKVCache

log = logging.getLogger(__name__)

# Features [N, d], positions [N] and slots [N], all on the device, to a cache.
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedKVCache], None]


class CapturedContext:
    """The padded writes of one drafter, over any number of caches."""

    def __init__(self, write: Write, device: torch.device, *, capture: bool) -> None:
        """`capture`: whether graphs are made; `device` must be a CUDA device then."""
        self._write = write
        self._capture = Capture(device) if capture else None
        self._pool: Any = None  # torch's handle of the memory that the graphs share
        self._caches: WeakKeyDictionary[PagedKVCache, dict[int, _Static]] = WeakKeyDictionary()
        self.failed = False  # a capture did; rows are written as they are from then on

    def warm_up(self, features: torch.Tensor, kv: PagedKVCache) -> None:
        """Capture all sizes before anybody waits for them; `features` [1, d] are of any values.

        The largest come first: the others find room in their memory.
        """
        for rows in reversed(KERNELS.rows):
            nowhere = torch.full((rows,), NOWHERE)
            self.run(features.expand(rows, -1), torch.zeros(rows, dtype=torch.int64), nowhere, kv)

    def run(
        self,
        features: torch.Tensor,  # [N, d]
        positions: torch.Tensor,  # [N] int64, on the host
        slots: torch.Tensor,  # [N] int64, on the host
        kv: PagedKVCache,
    ) -> bool:
        """Write rows; False if these are not ones for padding."""
        rows = len(features)
        # A graph knows where the cache lies: its memory must be there before.
        if rows > KERNELS.rows[-1] or self.failed or not kv.allocated:
            return False
        padded = next(size for size in KERNELS.rows if size >= rows)
        held = self._caches.setdefault(kv, {})
        static = held.get(padded)
        if static is None:
            static = _Static(padded, features)
        static.fill(features, positions, slots)
        if padded not in held:
            if self._capture is not None and not self._captured(static, self._capture, kv):
                return False
            held[padded] = static
        if static.graph is None:
            self._run(static, kv)
        else:
            static.graph.replay()
        return True

    def _run(self, static: _Static, kv: PagedKVCache) -> None:
        self._write(static.features, static.positions, static.slots, kv)

    def _captured(self, static: _Static, capture: Capture, kv: PagedKVCache) -> bool:
        """Capture a write whose buffers are filled; False, for good, if that cannot be done."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            static.graph = capture(lambda: self._run(static, kv), self._pool)
        except RuntimeError as error:
            self.failed = True
            self._caches.clear()
            log.warning("context writes are not captured, and cost more to launch: %s", error)
            return False
        log.info("captured the write of %d rows of context", len(static.features))
        return True


@dataclass(init=False, slots=True)
class _Static:
    """The inputs of one size, and its graph."""

    features: torch.Tensor  # [N, d]
    positions: torch.Tensor  # [N]
    slots: torch.Tensor  # [N]
    graph: torch.cuda.CUDAGraph | None
    _packing: Packing
    _padding: torch.Tensor
    _buffer: torch.Tensor

    def __init__(self, padded: int, features: torch.Tensor) -> None:
        self.features = features.new_zeros(padded, features.shape[1])
        self.graph = None
        # Padding: rows that are written where nobody reads.
        padding = [torch.zeros(padded, dtype=torch.int64), torch.full((padded,), NOWHERE)]
        self._packing = Packing(padding)
        self._padding = self._packing.fill(self._packing.buffer("cpu"), padding)
        self._buffer = self._packing.buffer(features.device)
        self.positions, self.slots = self._packing.views(self._buffer)

    def fill(self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Take in rows that fit; what is on the host in one copy."""
        self.features[: len(features)].copy_(features)
        staged = self._packing.buffer("cpu", pinned=self._buffer.device.type == "cuda")
        staged.copy_(self._padding)
        for line, values in zip(self._packing.views(staged), (positions, slots), strict=True):
            line[: len(values)].copy_(values)
        self._buffer.copy_(staged, non_blocking=True)
