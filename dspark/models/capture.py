"""Capturing work on a CUDA device as a graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WARM_UPS = 2  # kernels are compiled, and libraries choose theirs, in the first runs


class Capture:
    """Captures on one device, on a stream of its own."""

    made = 0  # by all, in this process: whoever times things is told that they took longer for it

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
        """The graph of what `run` launches; RuntimeError if it cannot be captured.

        `pool`: torch's handle of the memory that the graph takes.
        """
        Capture.made += 1
        main = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream current.
        with torch.cuda.stream(main), _nothing_collected():
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                for _ in range(_WARM_UPS):
                    run()
            # Other threads of the process may allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=self._side, capture_error_mode="thread_local"
            ):
                run()
            main.wait_stream(self._side)
        return graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Another graph that is collected in the middle would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
