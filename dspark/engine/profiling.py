"""Measuring the step-time table on the machine that will run the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch

from dspark.engine.judge import Judged, judge
from dspark.kernels.attention_plan import pages_for, plan_attention
from dspark.kernels.cpu import operators
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import Fence, Request, SamplingParams

_CONTEXT_TOKENS = 256
_PASSES = 5
_BUDGET_S = 20.0  # a start must not take for ever; what is left out is extrapolated


def profile_steps(
    target: TargetModel,
    *,
    block_size: int,
    max_requests: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepTimeTable:
    """Time real steps over requests × rows a request; calls `on_progress(done, total)`.

    All sizes are measured in turn, several times, so that a machine whose speed drifts bends the
    table as little as can be. On one so slow or busy that this takes long, the largest are left
    out.
    """
    context = min(_CONTEXT_TOKENS, target.max_positions // 2)
    requests = sorted(
        {1, *(r for r in (4, 8, 16, 32, 64) if r < max_requests), max(2, max_requests)}
    )
    rows = sorted({1, 2, block_size + 1} if block_size else {1, 2})
    pages = pages_for(context + max(rows))
    kv = PagedKVCache(pages * max(requests) + 1, target.device)
    cells = [(r, q) for r in requests for q in rows]
    samples: dict[tuple[int, int], list[float]] = {}
    operators.spread_threads()
    _step_ms(target, kv, step_batch(target, 1, 1, context, pages))  # the cache gets its memory
    started = time.perf_counter()
    total = len(cells) * (1 + _PASSES)
    for done, (r, q) in enumerate(cells * (1 + _PASSES)):
        late = time.perf_counter() - started > _BUDGET_S
        warming_up = done < len(cells)
        measured = {r for r, _ in samples}
        if late and (not warming_up or (q == rows[0] and len(measured) >= 2)):
            break
        times = samples.setdefault((r, q), [])
        times.append(_step_ms(target, kv, step_batch(target, r, q, context, pages)))
        on_progress(done + 1, total)
    complete = min(map(len, samples.values()))
    return StepTimeTable.from_samples(
        {cell: times[min(1, complete - 1) :] for cell, times in samples.items()},
        fingerprint(target),
    )


def _step_ms(target: TargetModel, kv: PagedKVCache, batch: TargetBatch) -> float:
    """One step, with everything greedy."""
    greedy = SamplingParams(temperature=0.0)
    asked = [
        Judged(Request(str(i), (0,), greedy), Fence(str(i), 0, 0, 1), None, 0)
        for i in range(len(batch.logit_rows))
    ]
    started = time.perf_counter()
    judge(target.forward(batch, kv).logits, asked)
    return (time.perf_counter() - started) * 1e3


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
        token_ids=torch.arange(total) % target.vocab_size,
        attention=plan_attention(
            tables, [context - rows] * requests, [rows] * requests, target.device
        ),
        logit_rows=torch.arange(total),
    )
