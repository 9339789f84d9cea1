"""Which thread computes. OpenMP keeps a pool of helpers for each thread that ever did.

With more pooled threads than cores in the process, libgomp lets waiting helpers sleep at once, and
a step has hundreds of places where they wait for microseconds: half of its time was lost to waking
up. So whatever else computes, loading and profiling, does so on a thread that ends, and takes its
helpers along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


async def compute_apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` on a thread of its own, which has ended when this returns."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.wrap_future(thread.submit(work, *args, **kwargs))


def use_all_threads() -> None:
    """Give the calling thread the number of helpers that torch was told to use.

    torch does so at the first of its own loops that is long enough; ours may come before.
    """
    torch.set_num_threads(torch.get_num_threads())
