"""A drafter's draws in padded shapes, captured as CUDA graphs and replayed (paper §5.3).

A block is drawn position by position, in two small kernels each: launching them costs more than
they do. So sessions are padded to powers of two, and the LM head and all positions are captured
once for each shape that occurs: what comes in lies in static buffers.

Where nothing can be captured the same padded draw runs as it is, which is how it is tested.

Symbols: S sessions, padded; B block size, d width, K candidates.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dspark.decoding.drawing import GREEDY, INDEPENDENT, DrawnBlocks, DrawRules
from dspark.kernels.transfer import Packing, to_device
from dspark.models.capture import Capture

log = logging.getLogger(__name__)

_MOST_SESSIONS = 64  # beyond, kernels take longer than launching them
_MOST_GRAPHS = 64  # sizes by lengths and kinds; the least recently used goes

# From hidden states [S, B, d], anchors [S], rules, K and whether all are greedy to what is drawn.
Draw = Callable[[torch.Tensor, torch.Tensor, DrawRules, int, bool], DrawnBlocks]
Shape = tuple[int, int, int, bool]  # S, B, K, whether all are greedy


class CapturedDraw:
    """The padded draws of one drafter."""

    def __init__(self, draw: Draw, device: torch.device, *, capture: bool) -> None:
        """`capture`: whether graphs are made; `device` must be a CUDA device then."""
        self._draw = draw
        self._device = device
        self._capture = Capture(device) if capture else None
        self._pool: Any = None  # torch's handle of the memory that the graphs share
        self._shapes: OrderedDict[Shape, _Static] = OrderedDict()
        self.failed = False  # a capture did; draws run as they are from then on

    def warm_up(self, hidden: torch.Tensor, candidates: int) -> None:
        """Capture all draws of blocks of this length before anybody waits for them.

        `hidden` [1, B, d] are of any values. The largest come first: the others find room in their
        memory.
        """
        sessions = _MOST_SESSIONS
        while sessions:
            for kind in (GREEDY, INDEPENDENT):
                rules = _rules(sessions, hidden.shape[1], kind)
                anchors = torch.zeros(sessions, dtype=torch.int64)
                self.run(hidden.expand(sessions, -1, -1), anchors, rules, candidates)
            sessions //= 2

    def run(
        self,
        hidden: torch.Tensor,  # [S, B, d]
        anchors: torch.Tensor,  # [S] on the host
        rules: DrawRules,  # on the host
        candidates: int,
    ) -> DrawnBlocks:
        """What is drawn; more sessions than are worth padding are drawn for as they are."""
        sessions, size, _ = hidden.shape
        greedy = rules.present() <= {GREEDY}
        if sessions > _MOST_SESSIONS or self.failed:
            anchors, *placed = to_device([anchors, *rules.tensors], self._device)
            return self._draw(hidden, anchors, DrawRules(*placed), candidates, greedy)
        padded = 1 << (sessions - 1).bit_length()
        shape = (padded, size, candidates, greedy)
        static = self._shapes.get(shape)
        if static is None:
            static = _Static(padded, hidden)
        static.fill(hidden, anchors, rules)
        if shape not in self._shapes:
            if self._capture is not None and not self._captured(static, shape, self._capture):
                return self.run(hidden, anchors, rules, candidates)
            self._shapes[shape] = static
            if len(self._shapes) > _MOST_GRAPHS:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(shape)
        if static.graph is None:
            static.drawn = self._run(static, shape)
        else:
            static.graph.replay()
        assert static.drawn is not None
        # Copies, since the next draw writes to the same memory.
        return DrawnBlocks(*(tensor[:sessions].clone() for tensor in static.drawn.tensors))

    def _run(self, static: _Static, shape: Shape) -> DrawnBlocks:
        return self._draw(static.hidden, static.anchors, static.rules, shape[2], shape[3])

    def _captured(self, static: _Static, shape: Shape, capture: Capture) -> bool:
        """Capture a draw whose buffers are filled; False, for good, if that cannot be done."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()

        def run() -> None:
            static.drawn = self._run(static, shape)

        try:
            static.graph = capture(run, self._pool)
        except RuntimeError as error:
            self.failed = True
            self._shapes.clear()
            log.warning("draws are not captured, and cost more to launch: %s", error)
            return False
        log.info("captured the draw of %d blocks of %d from %d candidates", *shape[:3])
        return True


def _rules(sessions: int, size: int, kind: int) -> DrawRules:
    return DrawRules(
        kinds=torch.full((sessions,), kind),
        temperature=torch.ones(sessions),
        top_k=torch.zeros(sessions, dtype=torch.int64),
        top_p=torch.ones(sessions),
        keys=torch.zeros(sessions, size, dtype=torch.int64),
    )


@dataclass(init=False, slots=True)
class _Static:
    """The inputs of one shape, its graph and what that writes."""

    hidden: torch.Tensor  # [S, B, d]
    anchors: torch.Tensor  # [S]
    rules: DrawRules
    graph: torch.cuda.CUDAGraph | None
    drawn: DrawnBlocks | None
    _packing: Packing
    _padding: torch.Tensor
    _buffer: torch.Tensor

    def __init__(self, padded: int, hidden: torch.Tensor) -> None:
        self.hidden = hidden.new_zeros(padded, *hidden.shape[1:])
        self.graph, self.drawn = None, None
        # Padding: greedy sessions, whose tokens nobody asks for.
        nobody = _rules(padded, hidden.shape[1], GREEDY)
        padding = [torch.zeros(padded, dtype=torch.int64), *nobody.tensors]
        self._packing = Packing(padding)
        self._padding = self._packing.fill(self._packing.buffer("cpu"), padding)
        self._buffer = self._packing.buffer(hidden.device)
        self.anchors, *rules = self._packing.views(self._buffer)
        self.rules = DrawRules(*rules)

    def fill(self, hidden: torch.Tensor, anchors: torch.Tensor, rules: DrawRules) -> None:
        """Take in sessions that fit; what is on the host in one copy."""
        self.hidden[: len(hidden)].copy_(hidden)
        staged = self._packing.buffer("cpu", pinned=self._buffer.device.type == "cuda")
        staged.copy_(self._padding)
        given = (anchors, *rules.tensors)
        for line, values in zip(self._packing.views(staged), given, strict=True):
            line[: len(values)].copy_(values)
        self._buffer.copy_(staged, non_blocking=True)
