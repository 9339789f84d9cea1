"""What each kernel cannot be faster than, on paper: bytes and FLOPs at the shapes of Qwen3-8B.

    python scripts/roofline.py [--write]

The floor is the larger of bytes over the memory's rate and FLOPs over the rate of bf16 products
without sparsity, both as the maker states them. --write puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
_BEGIN, _END = "<!-- roofline: begin -->", "<!-- roofline: end -->"

# Bytes a second, bf16 FLOP a second: data sheets of NVIDIA L4, A10, H100 SXM, H200 SXM.
GPUS = {
    "L4": (300e9, 121e12),
    "A10": (600e9, 125e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
}
HEADS, KV_HEADS, WIDTH = 32, 8, 128
HIDDEN, INNER, VOCABULARY = 4096, 12_288, 151_936
BLOCK, RANK, CANDIDATES = 7, 256, 32
BF16, FP32, INT64 = 2, 4, 8


@dataclass(frozen=True, slots=True)
class Work:
    """One launch, or one kernel's launches of one layer."""

    name: str
    bytes: float
    flops: float

    def floor_us(self, gpu: str) -> float:
        """On paper."""
        rate, products = GPUS[gpu]
        return max(self.bytes / rate, self.flops / products) * 1e6


def all_work() -> Iterator[Work]:
    """By kernel; S sequences of R rows at a context of L."""
    for sequences, rows, context in ((1, 1, 8192), (32, 1, 8192), (32, 8, 8192), (1, 2048, 2048)):
        keys = 2 * sequences * context * KV_HEADS * WIDTH * BF16
        queries = 2 * sequences * rows * HEADS * WIDTH * BF16
        seen = rows * context - rows * (rows - 1) / 2
        yield Work(
            f"attend_tiles, {sequences} × {rows} at {context}",
            keys + queries,
            4.0 * sequences * HEADS * WIDTH * seen,
        )
    for rows in (32, 256):
        qkv = rows * (HEADS + 2 * KV_HEADS) * WIDTH * BF16
        yield Work(f"rotate_write, {rows} rows", 2 * qkv + rows * WIDTH * FP32, 0.0)
        yield Work(f"add_rms_norm, {rows} rows", 4 * rows * HIDDEN * BF16, 0.0)
        yield Work(f"silu_mul, {rows} rows", 3 * rows * INNER * BF16, 0.0)
    for rows in (8, 256):
        logits = rows * VOCABULARY * BF16
        yield Work(f"row_chunks and decide, {rows} rows of logits", logits, 0.0)
    for sessions in (1, 32):
        weights = VOCABULARY * RANK * BF16
        logits = sessions * VOCABULARY * (BF16 + FP32)  # the backbone's read, the biased written
        yield Work(
            f"position_logits, {sessions} sessions",
            weights + logits,
            2.0 * sessions * VOCABULARY * RANK,
        )
        yield Work(f"draw_position, {sessions} sessions", sessions * VOCABULARY * FP32, 0.0)
    yield Work(f"admit, 512 × {BLOCK}", 512 * (BLOCK * FP32 + 2 * INT64), 0.0)


def table() -> str:
    """Markdown."""
    lines = [
        "| kernel | MB | GFLOP | " + " | ".join(f"{gpu} µs" for gpu in GPUS) + " |",
        "|---|---|---|" + "---|" * len(GPUS),
    ]
    for work in all_work():
        floors = " | ".join(f"{work.floor_us(gpu):.3g}" for gpu in GPUS)
        lines.append(
            f"| {work.name} | {work.bytes / 1e6:.3g} | {work.flops / 1e9:.3g} | {floors} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        text = _DOCS.read_text(encoding="utf-8")
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        _DOCS.write_text(f"{before}{_BEGIN}\n{table()}\n{_END}{after}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
