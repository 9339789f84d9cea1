"""Keys and values to their slots, on a GPU: as they are, or with what a layer does to them first.

Symbols: T rows, H query heads, G KV heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.triton.launch import launch, wait_for_earlier


@triton.jit
def write_kernel(
    to_keys,  # [slots, G, D]
    to_values,  # [slots, G, Dv]
    keys,  # [T, G, D], by strides
    values,  # [T, G, Dv]
    slots,  # [T] int64
    key_scales,  # [G] fp32: what is stored is key / scale
    value_scales,  # [G] fp32
    key_row,
    key_head,
    value_row,
    value_head,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    place = tl.load(slots + row) * KV_HEADS + group
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    key = tl.load(keys + row * key_row + group * key_head + d, mask=d < WIDTH)
    value = tl.load(values + row * value_row + group * value_head + dv, mask=dv < VALUE_WIDTH)
    if HAS_SCALES:
        key = key.to(tl.float32) / tl.load(key_scales + group)
        value = value.to(tl.float32) / tl.load(value_scales + group)
    tl.store(to_keys + place * WIDTH + d, key.to(to_keys.dtype.element_ty), mask=d < WIDTH)
    tl.store(
        to_values + place * VALUE_WIDTH + dv,
        value.to(to_values.dtype.element_ty),
        mask=dv < VALUE_WIDTH,
    )


@triton.jit
def rotate_write_kernel(
    qkv,  # [T, (H + 2G)·D]: queries are rotated in place
    to_keys,  # [slots, G, D]
    to_values,  # [slots, G, D]
    slots,  # [T] int64
    cos,  # [T, D/2] fp32
    sin,  # [T, D/2] fp32
    query_norm,  # [D]
    key_norm,  # [D]
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,  # half of the width
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # of queries, then of keys, then of values
    HALF: tl.constexpr = WIDTH // 2
    h = tl.arange(0, BLOCK_H)
    inside = h < HALF
    of_head = qkv + row * ((HEADS + 2 * KV_HEADS) * WIDTH) + head * WIDTH
    low = tl.load(of_head + h, mask=inside, other=0.0)
    high = tl.load(of_head + HALF + h, mask=inside, other=0.0)
    group = head - HEADS
    if group >= KV_HEADS:
        to_value = to_values + (tl.load(slots + row) * KV_HEADS + group - KV_HEADS) * WIDTH
        tl.store(to_value + h, low, mask=inside)
        tl.store(to_value + HALF + h, high, mask=inside)
    else:
        x = low.to(tl.float32)
        y = high.to(tl.float32)
        if HAS_NORM:
            norm = query_norm
            if group >= 0:
                norm = key_norm
            scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / WIDTH + eps)
            x = x * scale * tl.load(norm + h, mask=inside, other=0.0).to(tl.float32)
            y = y * scale * tl.load(norm + HALF + h, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + row * HALF + h, mask=inside, other=0.0)
        s = tl.load(sin + row * HALF + h, mask=inside, other=0.0)
        low = (x * c - y * s).to(low.dtype)
        high = (y * c + x * s).to(low.dtype)
        to = of_head
        if group >= 0:
            to = to_keys + (tl.load(slots + row) * KV_HEADS + group) * WIDTH
        tl.store(to + h, low, mask=inside)
        tl.store(to + HALF + h, high, mask=inside)


def write_rows(
    keys: torch.Tensor,  # [T, G, D]
    values: torch.Tensor,  # [T, G, Dv]
    to_keys: torch.Tensor,  # [slots, G, D], of their type or fp8
    to_values: torch.Tensor,  # [slots, G, Dv]
    slots: torch.Tensor,  # [T] int64
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,  # [G] fp32 each, for fp8
) -> None:
    """Rows to their slots."""
    rows, kv_heads, width = keys.shape
    value_width = values.shape[2]
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    values = values if values.stride(2) == 1 else values.contiguous()
    launch(
        write_kernel, (rows, kv_heads),
        to_keys, to_values, keys, values, slots,
        *((to_keys, to_values) if scales is None else scales),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        KV_HEADS=kv_heads, WIDTH=width, VALUE_WIDTH=value_width,
        BLOCK_D=triton.next_power_of_2(width), BLOCK_V=triton.next_power_of_2(value_width),
        HAS_SCALES=scales is not None, num_warps=1,
    )  # fmt: skip


def rotate_write(
    qkv: torch.Tensor,  # [T, (H + 2G)·D], queries rotated in place
    cos: torch.Tensor,  # [T, D/2] fp32
    sin: torch.Tensor,  # [T, D/2] fp32
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # [D] each, of queries and keys (Qwen3)
    eps: float,
    keys: torch.Tensor,  # [slots, G, D]
    values: torch.Tensor,  # [slots, G, D]
    slots: torch.Tensor,  # [T] int64
) -> None:
    """Norms and rotary embedding of queries and keys; keys and values go to their slots.

    fp32 in between, and one rounding at the end.
    """
    _, kv_heads, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    query_norm, key_norm = norms or (qkv, qkv)
    launch(
        rotate_write_kernel, (len(qkv), heads + 2 * kv_heads),
        qkv, keys, values, slots, cos, sin, query_norm, key_norm, eps,
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width,
        BLOCK_H=triton.next_power_of_2(width // 2), HAS_NORM=norms is not None, num_warps=1,
        early=True,
    )  # fmt: skip
