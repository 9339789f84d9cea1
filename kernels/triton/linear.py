"""Products whose rows do not depend on the rows beside them, to the bit, on a GPU.

torch's libraries choose a kernel by the number of rows, and so the order in which a row is summed.
Here tiles are of one size and a row is summed from the first k to the last, whatever else is in the
step. What that costs is measured by benchmarks/gpu_step_floor.py --batch-invariant.

Steps of few rows do nothing but read weights. Theirs is a kernel that is fast at it, of one shape
for any number of rows up to NARROW_ROWS: among such steps a row does not depend on the others,
either.

Symbols: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.triton.launch import (
    EARLY_FROM,
    INTERPRETED,
    capability_of,
    launch,
    wait_for_earlier,
)

BLOCK_T, BLOCK_N, BLOCK_K = 64, 32, 128
WARPS, STAGES = 4, 3
LEAST_CAPABILITY = 80  # below, Triton's products run without tensor cores, and these tiles spill

NARROW_ROWS = 16
NARROW_N, NARROW_K = 64, 128
NARROW_WARPS = 4
NARROW_STAGES = {2: 5, 4: 3}  # by an element's bytes: what 99 KiB of shared memory hold, before 9.0


@triton.jit
def linear_kernel(
    out,  # [T, N]
    x,  # [T, K]
    weight,  # [N, K]
    bias,  # [N]
    rows,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # products in fp32: the interpreter has no bf16 of its own
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # tiles that share weights run together
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    of_row = x + t[:, None].to(tl.int64) * INPUTS + k[None, :]
    of_output = weight + n[None, :].to(tl.int64) * INPUTS + k[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        left = INPUTS - start
        a = tl.load(of_row + start, mask=(t < rows)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(of_output + start, mask=(n < OUTPUTS)[None, :] & (k < left)[:, None], other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + t[:, None].to(tl.int64) * OUTPUTS + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(t < rows)[:, None] & (n < OUTPUTS)[None, :],
    )


@triton.jit(do_not_specialize=["rows"])  # one compilation, whatever their number
def narrow_kernel(
    out,  # [T, N]
    x,  # [T, K]
    weight,  # [N, K]
    bias,  # [N]
    rows,  # at most BLOCK_T
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # blocks end where the weight does
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    of_row = x + t[None, :].to(tl.int64) * INPUTS + k[:, None]
    of_output = weight + n[:, None].to(tl.int64) * INPUTS + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)  # tensor cores take outputs for rows
    for start in range(0, INPUTS, BLOCK_K):
        if EVEN:
            w = tl.load(of_output + start)
            a = tl.load(of_row + start, mask=(t < rows)[None, :], other=0.0)
        else:
            inside = k < INPUTS - start
            w = tl.load(of_output + start, mask=(n < OUTPUTS)[:, None] & inside[None, :], other=0.0)
            a = tl.load(of_row + start, mask=(t < rows)[None, :] & inside[:, None], other=0.0)
        if WIDE:
            w = w.to(tl.float32)
            a = a.to(tl.float32)
        total = tl.dot(w, a, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + t[None, :].to(tl.int64) * OUTPUTS + n[:, None],
        total.to(out.dtype.element_ty),
        mask=(t < rows)[None, :] & (n < OUTPUTS)[:, None],
    )


def linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:  # [T, N]
    """x Wᵀ + bias."""
    x, weight = x.contiguous(), weight.contiguous()
    (rows, inputs), outputs = x.shape, len(weight)
    out = x.new_empty(rows, outputs)
    launch(
        linear_kernel, (triton.cdiv(rows, BLOCK_T), triton.cdiv(outputs, BLOCK_N)),
        out, x, weight, out if bias is None else bias, rows,
        OUTPUTS=outputs, INPUTS=inputs, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        HAS_BIAS=bias is not None, WIDE=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def narrow_linear(
    x: torch.Tensor,  # [T, K], T <= NARROW_ROWS
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:  # [T, N]
    """x Wᵀ + bias of few rows, at the speed at which the weight is read."""
    x, weight = x.contiguous(), weight.contiguous()
    (rows, inputs), outputs = x.shape, len(weight)
    assert rows <= NARROW_ROWS
    out = x.new_empty(rows, outputs)
    launch(
        narrow_kernel, (triton.cdiv(outputs, NARROW_N), triton.cdiv(rows, NARROW_ROWS)),
        out, x, weight, out if bias is None else bias, rows,
        OUTPUTS=outputs, INPUTS=inputs, BLOCK_T=NARROW_ROWS, BLOCK_N=NARROW_N, BLOCK_K=NARROW_K,
        EVEN=outputs % NARROW_N == 0 and inputs % NARROW_K == 0,
        HAS_BIAS=bias is not None, WIDE=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=NARROW_WARPS, num_stages=NARROW_STAGES[x.element_size()], early=True,
    )  # fmt: skip
    return out


def narrow_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether few rows take `narrow_linear`: where it was measured to be faster, and in tests."""
    return INTERPRETED or (capability_of(device) >= EARLY_FROM and dtype.itemsize == 2)
