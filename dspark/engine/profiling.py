"""Measuring the step-time table on the machine that will run the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch

from dspark.engine.judge import Judged, judge
from dspark.engine.sequence import pages_for
from dspark.kernels.attention_plan import plan_attention
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import Fence, Request, SamplingParams

_CONTEXT_TOKENS = 256
_REPEATS = 3
_BUDGET_S = 20.0  # a start must not take for ever; what is left out is extrapolated


def profile_steps(
    target: TargetModel,
    *,
    block_size: int,
    max_requests: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepTimeTable:
    """Time real steps over requests × rows a request; calls `on_progress(done, total)`.

    On a machine so slow or busy that this takes long, the largest batches are left out.
    """
    context = min(_CONTEXT_TOKENS, target.max_positions // 2)
    requests = sorted(
        {1, *(r for r in (4, 8, 16, 32, 64) if r < max_requests), max(2, max_requests)}
    )
    rows = sorted({1, 2, block_size + 1} if block_size else {1, 2})
    pages = pages_for(context + max(rows))
    kv = PagedKVCache(pages * max(requests) + 1, target.device)
    samples: dict[tuple[int, int], list[float]] = {}
    cells = [(r, q) for r in requests for q in rows]
    started = time.perf_counter()
    for done, (r, q) in enumerate(cells):
        measured = {r for r, _ in samples}
        if q == rows[0] and len(measured) >= 2 and time.perf_counter() - started > _BUDGET_S:
            break
        batch = step_batch(target, r, q, context, pages)
        greedy = SamplingParams(temperature=0.0)
        asked = [
            Judged(Request(str(i), (0,), greedy), Fence(str(i), 0, 0, 1), None, 0)
            for i in range(r * q)
        ]
        times = []
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            judge(target.forward(batch, kv).logits, asked)
            times.append((time.perf_counter() - start) * 1e3)
        samples[r, q] = times[1:]  # the first warms up
        on_progress(done + 1, len(cells))
    return StepTimeTable.from_samples(samples, fingerprint(target))


def fingerprint(target: TargetModel) -> str:
    """Names what a table is valid for: model shape, dtype, device, threads and torch."""
    facts = (
        target.config.to_json_string(use_diff=False),
        str(target.dtype),
        str(target.device),
        torch.get_num_threads(),
        torch.__version__,
    )
    return sha256(repr(facts).encode()).hexdigest()[:16]


def step_batch(
    target: TargetModel, requests: int, rows: int, context: int, pages: int
) -> TargetBatch:
    """A step of `requests` requests, the newest `rows` of `context` positions each."""
    total = requests * rows
    tables = [
        np.arange(1 + r * pages, 1 + (r + 1) * pages, dtype=np.int32) for r in range(requests)
    ]
    return TargetBatch(
        token_ids=torch.arange(total, device=target.device) % target.vocab_size,
        attention=plan_attention(
            tables, [context - rows] * requests, [rows] * requests, target.device
        ),
        logit_rows=torch.arange(total, device=target.device),
    )
