"""The verifier's step by itself: rows, context, and what a long run leaves behind.

Three tables: step time over requests × rows a request; over context length; and memory while short
requests come and go. Plain target steps, greedy, nothing else running.

    python benchmarks/engine.py --output engine.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dspark.config import EngineConfig, ModelConfig
from dspark.engine.assembly import load_target
from dspark.engine.llm import LLM
from dspark.engine.profiling import step_batch
from dspark.engine.sequence import pages_for
from dspark.evaluation.provenance import provenance
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.types import SamplingParams

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
    memory = memory_run(options.target, options.requests) if options.requests else []
    for at in memory:
        console.print(f"after {at['requests']} requests: {at['mib']:.0f} MiB resident")
    if options.output:
        result = {"rows": rows, "contexts": contexts, "memory": memory, **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def step_ms(target: TargetModel, requests: int, rows: int, context: int, repeats: int) -> float:
    """Median time of a step, its plan included."""
    pages = pages_for(context)
    kv = PagedKVCache(requests * pages + 1, target.device)
    samples = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        target.forward(step_batch(target, requests, rows, context, pages), kv)
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


def show(title: str, down: str, across: str, cells: list[dict[str, float]]) -> None:
    names = list(cells[0])
    columns = sorted({cell[names[1]] for cell in cells})
    table = Table(title=title)
    table.add_column(f"{down} \\ {across}", justify="right")
    for column in columns:
        table.add_column(str(column), justify="right")
    for row in sorted({cell[names[0]] for cell in cells}):
        of = {cell[names[1]]: cell["ms"] for cell in cells if cell[names[0]] == row}
        table.add_row(str(row), *(f"{of[column]:.1f}" for column in columns))
    console.print(table)


if __name__ == "__main__":
    main()
