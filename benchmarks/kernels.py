"""Attention kernels on a GPU, against the copy and matmul ceilings measured in the same run.

    python benchmarks/kernels.py [--tune] [--json FILE]

Each cell is a layer's attention at the shapes of Qwen3-8B (32 query heads over 8, of 128): so many
sequences, rows each, and context. Layers in turn, so that none finds its keys in the L2 cache,
captured as one CUDA graph, so that launching counts for nothing. `bytes` are those of keys, values,
queries and results, read or written once; `of copy` is their rate over that of a copy.

--tune tries launch configurations for decoding and verification and prints the best ones in the
form of kernels/triton/launch_configs.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dspark.evaluation.provenance import provenance
from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan, plan_attention
from dspark.kernels.reference.paged_attention import paged_attention as reference

HEADS, KV_HEADS, WIDTH = 32, 8, 128
# sequences, rows of each, context: decoding, verifying blocks of 7, a prompt's chunk
CELLS = (
    (1, 1, 8192), (8, 1, 8192), (32, 1, 8192), (64, 1, 2048),
    (1, 8, 8192), (8, 8, 8192), (32, 8, 2048), (32, 8, 8192), (1, 2048, 2048),
)  # fmt: skip
_CACHES_BYTES = 1 << 28  # of all layers together, at least: several times an L2 cache
_REPEATS = 7


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
    if options.json:
        found = {"cells": [asdict(result) for result in results], **provenance()}
        options.json.write_text(json.dumps({"copy": copied, "matmul": multiplied, **found}))


if __name__ == "__main__":
    main()
