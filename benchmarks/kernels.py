"""The kernels on a GPU, against the copy and matmul ceilings measured in the same run.

    python benchmarks/kernels.py [--tune] [--json FILE]

Attention first. Each cell is a layer's attention at the shapes of Qwen3-8B (32 query heads over 8,
of 128): so many sequences, rows each, and context. Layers in turn, so that none finds its keys in
the L2 cache, captured as one CUDA graph, so that launching counts for nothing. `bytes` are those of
keys, values, queries and results, read or written once; `of copy` is their rate over that of a
copy. Then all other kernels, each by the device's own clock, beside the time that a copy of what it
must read and write would take.

--tune tries launch configurations for decoding and verification and prints the best ones in the
form of kernels/triton/launch_configs.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dspark.decoding.drawing import DrawRules
from dspark.evaluation.provenance import provenance
from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan, plan_attention
from dspark.kernels.cpu.operators import JudgeRules
from dspark.kernels.reference.paged_attention import paged_attention as reference

HEADS, KV_HEADS, WIDTH = 32, 8, 128
# sequences, rows of each, context: decoding, verifying blocks of 7, a prompt's chunk
CELLS = (
    (1, 1, 8192), (8, 1, 8192), (32, 1, 8192), (64, 1, 2048),
    (1, 8, 8192), (8, 8, 8192), (32, 8, 2048), (32, 8, 8192), (1, 2048, 2048),
)  # fmt: skip
_CACHES_BYTES = 1 << 28  # of all layers together, at least: several times an L2 cache
_REPEATS = 25


@dataclass(frozen=True, slots=True)
class Result:
    """One cell of the table."""

    sequences: int
    rows: int
    context: int
    triton_us: float
    sdpa_us: float
    of_copy: float
    of_matmul: float


class Cell:
    """A step's attention over several layers."""

    def __init__(self, sequences: int, rows: int, context: int) -> None:
        self.shape = sequences, rows, context
        pages = -(-context // PAGE_SIZE)
        order = np.random.default_rng(0).permutation(sequences * pages).astype(np.int32) + 1
        self.plan: AttentionPlan = plan_attention(
            list(order.reshape(sequences, pages)),
            [context - rows] * sequences,
            [rows] * sequences,
            "cuda",
        )
        slots = (sequences * pages + 1) * PAGE_SIZE
        size = slots * KV_HEADS * WIDTH * 4
        self.layers = [
            torch.randn(2, slots, KV_HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(1, min(8, -(-_CACHES_BYTES // size))))
        ]
        self.query = torch.randn(
            sequences * rows, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16
        )

    @property
    def bytes(self) -> float:
        """Moved at least, by one layer."""
        sequences, rows, context = self.shape
        return sequences * (2 * context * KV_HEADS + 2 * rows * HEADS) * WIDTH * 2

    @property
    def flops(self) -> float:
        """Of one layer: causal inside the rows, full before them."""
        sequences, rows, context = self.shape
        return 4.0 * sequences * HEADS * WIDTH * (rows * context - rows * (rows - 1) / 2)

    def us(self, attend: Callable[..., torch.Tensor]) -> float:
        """Of one layer."""

        def run() -> None:
            for keys, values in self.layers:
                attend(self.query, keys, values, self.plan, scale=WIDTH**-0.5)

        return graph_us(run) / len(self.layers)


def graph_us(run: Callable[[], object]) -> float:
    """Median time of what is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return events_us(graph.replay)


def events_us(run: Callable[[], object]) -> float:
    """Median time of what is launched, by the device's clock."""
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 500.0)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not captured: a copy in a graph is slower than one of torch's own.
    copied = 2.0 * source.numel() / events_us(lambda: target.copy_(source)) * 1e6
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = 2.0 * side**3 / graph_us(lambda: a @ b) * 1e6
    return copied, multiplied


def check(cell: Cell) -> None:
    """Stop unless the kernel agrees with the reference in fp32."""
    from dspark.kernels.triton.attention import paged_attention

    keys, values = cell.layers[0]
    got = paged_attention(cell.query, keys, values, cell.plan, scale=WIDTH**-0.5)
    want = reference(cell.query.float(), keys.float(), values.float(), cell.plan, scale=WIDTH**-0.5)
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)


def tune() -> None:
    """Print the configuration with the least summed ratio over cells of few rows, by width 128."""
    from dspark.kernels.triton.attention import paged_attention
    from dspark.kernels.triton.launch_configs import AttentionConfig

    cells = [Cell(*shape) for shape in ((1, 1, 8192), (16, 1, 8192), (4, 8, 8192), (32, 8, 2048))]
    grid = itertools.product((32, 64, 128), (256, 512, 1024), (4, 8), (2, 3, 4))
    found = []
    for keys, split, warps, stages in grid:
        config = AttentionConfig(split, keys, warps, stages, 64, 64, 4, 2)
        try:
            times = [
                cell.us(lambda *a, config=config, **k: paged_attention(*a, config=config, **k))
                for cell in cells
            ]
        except Exception as error:  # too much shared memory: not for this GPU
            print(f"{config}: {type(error).__name__}", file=sys.stderr)
            continue
        found.append((times, config))
    best = [min(times[i] for times, _ in found) for i in range(len(cells))]
    found.sort(key=lambda one: sum(t / b for t, b in zip(one[0], best, strict=True)))
    for times, config in found[:8]:
        print(json.dumps(asdict(config)), " ".join(f"{t:.1f}" for t in times))
    prompt, base = Cell(1, 2048, 2048), found[0][1]
    for rows, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        config = replace(
            base, long_rows=rows, long_block_keys=keys, long_warps=warps, long_stages=stages
        )
        us = prompt.us(lambda *a, config=config, **k: paged_attention(*a, config=config, **k))
        print("prompt", rows, keys, warps, stages, f"{us:.1f}")


def others(copied: float) -> list[tuple[str, float, float]]:
    """Kernels by name and shape: µs of a launch, and µs that a copy of as much would take."""
    from dspark.kernels.triton import acceptance, admission, cache_write, draft_head, linear, rows

    hidden, inner, vocabulary, rank, candidates = 4096, 12_288, 151_936, 256, 32

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    found = []

    def time(label: str, moved: Mapping[str, float], run: Callable[[], object]) -> None:
        for name, us in kernel_us(run).items():
            if name in moved:
                found.append((f"{name}, {label}", us, moved[name] / copied * 1e6))

    for count in (32, 256):
        x, delta, weight = normal(count, hidden), normal(count, hidden), normal(hidden)
        time(f"{count} rows", {"add_rms_norm_kernel": 8.0 * count * hidden},
             lambda x=x, d=delta, w=weight: rows.add_rms_norm(x, d, w, 1e-6))  # fmt: skip
        gate_up = normal(count, 2 * inner)
        time(f"{count} rows", {"silu_mul_kernel": 6.0 * count * inner},
             lambda g=gate_up: rows.silu_mul(g))  # fmt: skip
        qkv = normal(count, (HEADS + 2 * KV_HEADS) * WIDTH)
        keys, values = normal(2, 4096, KV_HEADS, WIDTH)
        angles = normal(count, WIDTH // 2, dtype=torch.float32)
        norms = normal(WIDTH), normal(WIDTH)
        slots = torch.arange(count, device="cuda")
        time(f"{count} rows", {"rotate_write_kernel": 4.0 * qkv.numel()},
             lambda q=qkv, a=angles, k=keys, v=values, s=slots, n=norms: cache_write.rotate_write(
                 q, a, a, n, 1e-6, k, v, s))  # fmt: skip
        weight = normal(6144, hidden)
        time(f"{count} rows × 4096 × 6144", {"linear_kernel": 2.0 * weight.numel()},
             lambda x=x, w=weight: linear.linear(x, w))  # fmt: skip
    for sequences, kind, top_p in ((1, 0, 1.0), (32, 0, 1.0), (32, 1, 1.0), (32, 2, 1.0),
                                   (32, 1, 0.9)):  # fmt: skip
        lengths = [7] * sequences
        logits = 3.0 * normal(8 * sequences, vocabulary)
        rules = JudgeRules(
            kinds=torch.full((sequences,), kind), temperature=torch.ones(sequences),
            top_k=torch.zeros(sequences, dtype=torch.int64),
            top_p=torch.full((sequences,), top_p),
            accept_keys=torch.arange(7 * sequences), recover_keys=torch.arange(sequences),
            noise_keys=torch.arange(8 * sequences),
        )  # fmt: skip
        ids = torch.randint(vocabulary, (7 * sequences, candidates))
        law = torch.full(ids.shape, 1.0 / candidates)
        label = f"{8 * sequences} rows, {('greedy', 'rejection', 'coupled')[kind]}"
        read = 2.0 * logits.numel()
        time(label + (f", top-p {top_p}" if top_p < 1 else ""),
             {"row_chunks": read, "find_cuts": read, "decide": 0.0},
             lambda x=logits, n=lengths, i=ids, p=law, r=rules: acceptance.judge(
                 x, n, i[:, 0].contiguous(), i, p, r))  # fmt: skip
        del logits
    for sessions in (1, 32):
        base, states = normal(sessions, 7, vocabulary), normal(sessions, 7, hidden)
        head = draft_head.DraftHead(
            torch.arange(vocabulary, device="cuda"), w1=normal(vocabulary, rank),
            w2=normal(vocabulary, rank), confidence=normal(hidden + rank),
            confidence_bias=normal(1),
        )  # fmt: skip
        draw = DrawRules(
            kinds=torch.ones(sessions, dtype=torch.int64, device="cuda"),
            temperature=torch.ones(sessions, device="cuda"),
            top_k=torch.zeros(sessions, dtype=torch.int64, device="cuda"),
            top_p=torch.ones(sessions, device="cuda"),
            keys=torch.arange(7 * sessions, device="cuda").view(sessions, 7),
        )
        anchors = torch.zeros(sessions, dtype=torch.int64, device="cuda")
        moved = {
            "position_logits": vocabulary * (2.0 * rank + 6.0 * sessions),
            "draw_position": 0.0,
        }
        time(f"{sessions} sessions", moved, lambda b=base, s=states, h=head, a=anchors, r=draw:
             draft_head.draw_blocks(b, s, a, h, r, candidates))  # fmt: skip
        del base
    blocks = normal(512, 15, dtype=torch.float32)
    time("512 × 15", {"admit_kernel": 0.0}, lambda: admission.admit(
        blocks, torch.full((512,), 15, device="cuda"), torch.arange(512, device="cuda") % 2,
        torch.ones(2, 15, device="cuda"), torch.zeros(2, 15, device="cuda"),
        torch.tensor([2000], device="cuda")))  # fmt: skip
    return found


def kernel_us(run: Callable[[], object]) -> dict[str, float]:
    """Mean time of a launch, by kernel."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(_REPEATS):
            run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / event.count for event in seen.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: these kernels are timed on a GPU only")
    from dspark.kernels.triton.attention import paged_attention

    if options.tune:
        tune()
        return
    copied, multiplied = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copied / 1e12:.2f} TB/s, "
          f"bf16 product {multiplied / 1e12:.0f} TFLOP/s")  # fmt: skip
    print("| sequences | rows | context | Triton µs | torch µs | of copy | of product |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for shape in CELLS:
        cell = Cell(*shape)
        check(cell)
        triton_us, sdpa_us = cell.us(paged_attention), cell.us(reference)
        result = Result(
            *shape, triton_us, sdpa_us,
            cell.bytes / triton_us * 1e6 / copied, cell.flops / triton_us * 1e6 / multiplied,
        )  # fmt: skip
        results.append(result)
        print(f"| {shape[0]} | {shape[1]} | {shape[2]} | {triton_us:.1f} | {sdpa_us:.1f} | "
              f"{result.of_copy:.2f} | {result.of_matmul:.2f} |", flush=True)  # fmt: skip
        del cell
        torch.cuda.empty_cache()
    print("| kernel | µs | a copy of as much, µs |")
    print("|---|---|---|")
    small = others(copied)
    for name, us, floor_us in small:
        print(
            f"| {name} | {us:.1f} | {floor_us:.1f} |" if floor_us else f"| {name} | {us:.1f} | – |"
        )
    if options.json:
        found = {"others": small, "cells": [asdict(result) for result in results], **provenance()}
        options.json.write_text(json.dumps({"copy": copied, "matmul": multiplied, **found}))


if __name__ == "__main__":
    main()
