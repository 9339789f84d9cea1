"""How kernels are launched: by torch's device and stream, or under Triton's interpreter."""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import cache
from typing import Any

import torch

# Products and sums become one rounding; Triton 3.10 will change what it does unasked.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl

# $TRITON_INTERPRET=1 when Triton is imported: kernels run on the CPU, slowly, for tests.
INTERPRETED: bool = triton.knobs.runtime.interpret

# How often each kernel was launched by this process, by name: what is captured into a graph counts
# once. For tests and for those who ask what serves them.
launches: Counter[str] = Counter()

EARLY_FROM = 90  # the capability from which a kernel can be started before the last has ended
# Asking costs a program some time, also when there is nothing to wait for: more programs than run
# at once pay for it again and again. On an H100 a step of 256 rows took 13 % longer.
_EARLY_PROGRAMS = 2560


@cache
def capability_of(device: torch.device) -> int:
    """Such as 90; more than any where kernels are interpreted."""
    if INTERPRETED or device.type != "cuda":
        return 1000
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """The first statement of every kernel that is launched with `early=True`.

    Such a kernel may be started while the one before it still runs. Until this returns it must not
    read what a kernel may have written, nor write: what is there may still be read. A program with
    nothing to do waits, too: the next kernel waits for this one alone, so the end of this one has
    to mean that all before it have ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        # From here the next kernel may be started, to wait in its turn: it is once every program
        # of ours has come here, so that it takes no room from one that has not begun.
        tl.extra.cuda.gdc_launch_dependents()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, early: bool = False, **sizes: Any
) -> None:
    """Start `kernel` on the device of its first tensor; a grid of nothing starts nothing.

    `early`: before the kernel that it follows has ended (CUDA's programmatic dependent launch), on
    GPUs that can and if it is small; EARLY tells the kernel, which has to begin with
    `wait_for_earlier(EARLY)`.
    """
    if 0 in grid:
        return
    launches[kernel.__name__] += 1
    first: torch.Tensor = arguments[0]
    if early:
        able = not INTERPRETED and capability_of(first.device) >= EARLY_FROM
        sizes["EARLY"] = able and math.prod(grid) <= _EARLY_PROGRAMS
        if sizes["EARLY"]:
            sizes["launch_pdl"] = True
    if INTERPRETED or first.device.type != "cuda":
        kernel[grid](*arguments, **sizes)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **sizes)
