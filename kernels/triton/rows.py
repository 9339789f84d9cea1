"""What a layer does to its rows one by one: norms, and the gate of its MLP.

fp32 within a row and one rounding at the end; a row's sum has one order, whatever is beside it.

Symbols: T rows, d width of the model, I width of the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.triton.launch import launch, wait_for_earlier

_WIDE = 2048  # elements of a row from which eight warps share it
_GATE_BLOCK = 1024


@triton.jit
def add_rms_norm_kernel(
    out,  # [T, d]
    residual,  # [T, d], updated in place
    delta,  # [T, d]
    weight,  # [d]
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    x = tl.load(residual + row * WIDTH + i, mask=inside, other=0.0)
    if HAS_DELTA:
        more = tl.load(delta + row * WIDTH + i, mask=inside, other=0.0)
        # what is kept is what is normed: rounded once, as the residual is stored
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(residual + row * WIDTH + i, x, mask=inside)
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps)
    y = y * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, y.to(x.dtype), mask=inside)


@triton.jit
def silu_mul_kernel(
    out,  # [T, I]
    gate_up,  # [T, 2I]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * WIDTH + i, mask=inside, other=0.0)
    x = gate.to(tl.float32)
    y = x * tl.sigmoid(x) * up.to(tl.float32)
    tl.store(out + row * WIDTH + i, y.to(gate.dtype), mask=inside)


def add_rms_norm(
    residual: torch.Tensor,  # [T, d], updated in place
    delta: torch.Tensor | None,  # [T, d]
    weight: torch.Tensor,  # [d]
    eps: float,
) -> torch.Tensor:  # [T, d]
    """residual += delta; returns rms_norm(residual) · weight."""
    rows, width = residual.shape
    out = torch.empty_like(residual)
    launch(
        add_rms_norm_kernel, (rows,),
        out, residual, residual if delta is None else delta, weight, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), HAS_DELTA=delta is not None,
        num_warps=8 if width >= _WIDE else 4, early=True,
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:  # [T, 2I] -> [T, I]
    """silu(gate) · up."""
    rows, double = gate_up.shape
    width = double // 2
    out = gate_up.new_empty(rows, width)
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    launch(
        silu_mul_kernel, (rows, triton.cdiv(width, block)),
        out, gate_up, WIDTH=width, BLOCK=block, early=True,
    )  # fmt: skip
    return out
