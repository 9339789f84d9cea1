"""The verifier's step by itself: rows, context, its parts, and what a long run leaves behind.

Four tables: step time over requests × rows a request; over context length; the parts of a step,
each run alone through all layers; and memory while short requests come and go. Plain target steps,
greedy, nothing else running.

    python benchmarks/engine.py --output engine.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dspark.config import EngineConfig, ModelConfig
from dspark.engine.assembly import load_target
from dspark.engine.judge import Judged, judge
from dspark.engine.llm import LLM
from dspark.engine.profiling import step_batch
from dspark.evaluation.provenance import provenance
from dspark.kernels.attention_plan import pages_for
from dspark.kernels.cpu import operators
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.types import Fence, Request, SamplingParams

REQUESTS = (1, 2, 4, 8, 16, 32)
ROWS = (1, 2, 4, 6)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=2000, help="of the memory run; 0: none")
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    target = load_target(ModelConfig(options.target)).target
    rows = [
        {"requests": r, "rows": q, "ms": step_ms(target, r, q, 256, options.repeats)}
        for r in REQUESTS
        for q in ROWS
    ]
    show("step, ms, at 256 tokens of context", "requests", "rows a request", rows)
    contexts = [
        {"context": c, "requests": r, "ms": step_ms(target, r, 1, c, options.repeats)}
        for c in CONTEXTS
        if c <= target.max_positions
        for r in (1, 4)
    ]
    show("step, ms, one row a request", "context", "requests", contexts)
    parts = []
    if target.fused:
        for r, q in ((1, 1), (1, 6), (8, 1), (8, 6), (32, 1)):
            parts += [
                {"part": part, "rows": f"{r} × {q}", "ms": ms}
                for part, ms in step_parts(target, r, q, options.repeats).items()
            ]
        show(
            "parts of a step, ms, requests × rows, at 256 tokens of context", "rows", "part", parts
        )
    memory = memory_run(options.target, options.requests) if options.requests else []
    for at in memory:
        console.print(f"after {at['requests']} requests: {at['mib']:.0f} MiB resident")
    if options.output:
        result = {
            "rows": rows,
            "contexts": contexts,
            "parts": parts,
            "memory": memory,
            **provenance(),
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def step_ms(target: TargetModel, requests: int, rows: int, context: int, repeats: int) -> float:
    """Median time of a step, its plan included."""
    pages = pages_for(context)
    kv = PagedKVCache(requests * pages + 1, target.device)
    return median_ms(
        lambda: target.forward(step_batch(target, requests, rows, context, pages), kv), repeats
    )


def step_parts(target: TargetModel, requests: int, rows: int, repeats: int) -> dict[str, float]:
    """Median time of each operator through all layers, on weights and pages of its own."""
    config, dtype = target.config, torch.bfloat16
    width, layers = config.head_dim, config.num_hidden_layers
    heads, kv_heads, inner = (
        config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    )  # fmt: skip
    hidden, fused_width, total = config.hidden_size, (heads + 2 * kv_heads) * width, requests * rows
    pages = pages_for(256)
    batch = step_batch(target, requests, rows, 256, pages)
    plan = batch.attention
    store = [
        tuple(operators.new_pages(requests * pages + 1, kv_heads, width).normal_() for _ in "kv")
        for _ in range(layers)
    ]
    x, qkv = torch.randn(total, hidden, dtype=dtype), torch.randn(total, fused_width, dtype=dtype)
    mixed = torch.randn(total, heads * width, dtype=dtype)
    gate_up, act = (torch.randn(total, n, dtype=dtype) for n in (2 * inner, inner))
    norm, angles = torch.ones(hidden, dtype=dtype), torch.rand(total, width // 2)

    def linear(rows_in: torch.Tensor, outputs: int, count: int = layers) -> Callable[[], object]:
        weight = torch.randn(outputs, rows_in.shape[1], dtype=dtype)
        packed = [operators.pack_linear(weight) for _ in range(count)]
        return lambda: [operators.linear(rows_in, w, None, outputs) for w in packed]

    logits = torch.randn(total, config.vocab_size)
    greedy = SamplingParams(temperature=0.0)
    asked = [
        Judged(Request(str(i), (0,), greedy), Fence(str(i), 0, 0, 1), None, 0) for i in range(total)
    ]
    work: dict[str, Callable[[], object]] = {
        "qkv": linear(x, fused_width),
        "attention": lambda: [
            operators.attention(qkv, k, v, plan, heads, width, scale=width**-0.5) for k, v in store
        ],
        "out": linear(mixed, hidden),
        "gate, up": linear(x, 2 * inner),
        "down": linear(act, hidden),
        "rotate, write": lambda: [
            operators.rotate_write(qkv, angles, angles, None, 1e-5, k, v, plan.slots, heads, width)
            for k, v in store
        ],
        "norms": lambda: [operators.add_rms_norm(x, x, norm, 1e-5) for _ in range(2 * layers)],
        "silu": lambda: [operators.silu_mul(gate_up) for _ in range(layers)],
        "head": linear(x, config.vocab_size, 1),
        "judge": lambda: judge(logits, asked),
        "plan": lambda: step_batch(target, requests, rows, 256, pages),
    }
    return {part: median_ms(run, repeats) for part, run in work.items()}


def median_ms(run: Callable[[], object], repeats: int) -> float:
    samples = []
    for _ in range(repeats + 2):
        operators.spread_threads()
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples[2:])


def memory_run(target: str, requests: int) -> list[dict[str, float]]:
    """Resident memory as requests of random lengths pass through, drafting on."""
    llm = LLM(target, engine=EngineConfig(max_requests=16, cache_tokens=4096))
    generator = torch.Generator().manual_seed(0)
    seen = []
    for done in range(0, requests + 1, 100):
        if done % 500 == 0:
            seen.append({"requests": float(done), "mib": resident_mib()})
        prompts = [
            torch.randint(100, 40_000, (int(n),), generator=generator).tolist()
            for n in torch.randint(5, 60, (100,), generator=generator)
        ]
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8))
        llm.verifier.check_pages()
    return seen


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def show(title: str, down: str, across: str, cells: Sequence[Mapping[str, Any]]) -> None:
    names = list(cells[0])
    columns = list(dict.fromkeys(cell[names[1]] for cell in cells))
    table = Table(title=title)
    table.add_column(f"{down} \\ {across}", justify="right")
    for column in columns:
        table.add_column(str(column), justify="right")
    for row in dict.fromkeys(cell[names[0]] for cell in cells):
        of = {cell[names[1]]: cell["ms"] for cell in cells if cell[names[0]] == row}
        table.add_row(str(row), *(f"{of[column]:.1f}" for column in columns))
    console.print(table)


if __name__ == "__main__":
    main()
