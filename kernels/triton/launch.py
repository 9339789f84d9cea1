"""How kernels are launched: by torch's device and stream, or under Triton's interpreter."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch

# Products and sums become one rounding; Triton 3.10 will change what it does unasked.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

# $TRITON_INTERPRET=1 when Triton is imported: kernels run on the CPU, slowly, for tests.
INTERPRETED: bool = triton.knobs.runtime.interpret

# How often each kernel was launched by this process, by name: what is captured into a graph counts
# once. For tests and for those who ask what serves them.
launches: Counter[str] = Counter()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    """Start `kernel` on the device of its first tensor; a grid of nothing starts nothing."""
    if 0 in grid:
        return
    launches[kernel.__name__] += 1
    first: torch.Tensor = arguments[0]
    if INTERPRETED or first.device.type != "cuda":
        kernel[grid](*arguments, **sizes)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **sizes)
