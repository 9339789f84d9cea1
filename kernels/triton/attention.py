"""Attention of variable-length queries over paged keys and values, on a GPU.

A step's rows are cut into tiles: rows of one sequence, that stand one after the other. A tile's
program takes the query heads that share a KV head together, so that its keys are read once for all
of them, and a stretch of the keys. Long sequences have several stretches, for several programs, and
a second kernel merges what they found. Prompts have tiles enough: theirs take all keys in turn.

    o_i = Σ_j softmax_j(s(q_i · k_j)) v_j,   first_i <= j <= reach_i

A drafted block, whose rows see each other, is a matter of `reach`, sliding windows are one of
`first`; both come from the plan. Verification, chunked prefill and drafting are so one kernel.

Every row is summed over stretches of fixed bounds, in order: what comes out depends neither on the
rows beside it nor on how many sequences a step holds, as long as its tiles are of the same size.

Symbols: T rows, H query heads, G KV heads, D and Dv widths of keys and values, M tiles, S
sequences, W pages of the longest, X stretches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.attention_plan import PAGE_SIZE, TILE_ROWS, AttentionPlan, RowPlan
from dspark.kernels.triton.launch import INTERPRETED, launch, wait_for_earlier
from dspark.kernels.triton.launch_configs import AttentionConfig, attention_config

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


ALL_KEYS = 1 << 30  # a stretch that nothing is longer than


# How many stretches there are changes from step to step: nothing is compiled anew for that.
@triton.jit(do_not_specialize=["stretches", "table_width"])
def attend_tiles(
    out,  # [T, H, Dv], where there is one stretch
    partial,  # [T, H, X, Dv] fp32, where there are several
    partial_lse,  # [T, H, X] fp32: log2 of the sums of weights
    query,  # [T, H, D], rows `query_stride` apart
    keys,  # [slots, G, D]
    values,  # [slots, G, Dv]
    tile_first,  # [M] int32: the first row
    tile_rows,  # [M] int32; 0: no tile
    tile_sequence,  # [M] int32: whose row of the tables
    tables,  # [S, W] int32
    reach,  # [T] int64
    first_seen,  # [T] int64
    sinks,  # [H] fp32
    key_scales,  # [G] fp32, of fp8 keys
    value_scales,  # [G] fp32
    query_stride,
    table_width,
    stretches,
    scale_log2,  # of scores, times log2 e; without log2 e where they are capped
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,  # powers of two
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    STRETCH: tl.constexpr,  # keys
    SPLIT: tl.constexpr,  # there are several stretches
    HAS_FIRST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WIDE: tl.constexpr,  # products in fp32: the interpreter has no bf16 of its own
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    stretch = tl.program_id(2)
    rows = tl.load(tile_rows + tile)
    if rows == 0:
        return
    FOLD: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, BLOCK_M)
    real = member // FOLD < rows
    row = (tl.load(tile_first + tile) + member // FOLD).to(tl.int64)
    head = group * FOLD + member % FOLD
    last = tl.load(reach + row, mask=real, other=-1).to(tl.int32)
    end = tl.max(last, 0) + 1
    if HAS_FIRST:
        earliest = tl.load(first_seen + row, mask=real, other=1 << 30).to(tl.int32)
        begin = tl.min(earliest, 0)
    else:
        begin = 0
    from_key = tl.maximum(stretch * STRETCH, begin // BLOCK_N * BLOCK_N)
    to_key = tl.minimum((stretch + 1) * STRETCH, end)
    if (from_key >= to_key) & SPLIT:
        return  # nobody asks: the merge knows by the same bounds

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + row[:, None] * query_stride + head[:, None] * WIDTH + d[None, :],
        mask=real[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    if WIDE:
        q = q.to(tl.float32)
    if HAS_SCALES:
        score_scale = scale_log2 * tl.load(key_scales + group)
    else:
        score_scale = scale_log2
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    table = tables + tl.load(tile_sequence + tile).to(tl.int64) * table_width

    for start in range(from_key, to_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < to_key
        page = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
        slot = (page * PAGE + key % PAGE) * KV_HEADS + group
        k = tl.load(
            keys + slot[None, :] * WIDTH + d[:, None],
            mask=there[None, :] & (d < WIDTH)[:, None],
            other=0.0,
        )
        if HAS_SCALES or WIDE:
            k = k.to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * score_scale
        if HAS_SOFTCAP:
            small = tl.exp(-2.0 * tl.abs(scores) / softcap)  # tanh, without overflow
            capped = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0.0, -capped, capped) * _LOG2_E
        seen = there[None, :] & (key[None, :] <= last[:, None])
        if HAS_FIRST:
            seen = seen & (key[None, :] >= earliest[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        # a row that has seen nothing yet: its weights are 0, not 0/0
        base = tl.where(now == -float("inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            values + slot[:, None] * VALUE_WIDTH + dv[None, :],
            mask=there[:, None] & (dv < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        if HAS_SCALES or WIDE:
            v = v.to(q.dtype)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        highest = now

    some = tl.where(total == 0.0, 1.0, total)
    mixed = acc / some[:, None]
    lse = tl.where(total == 0.0, -float("inf"), highest + tl.log2(some))
    if HAS_SCALES:
        mixed = mixed * tl.load(value_scales + group)
    place = row * HEADS + head
    shown = real[:, None] & (dv < VALUE_WIDTH)[None, :]
    if not SPLIT:
        if HAS_SINKS:  # as the merge does it, to the bit
            sink = tl.load(sinks + head, mask=real, other=0.0) * _LOG2_E
            now = tl.maximum(lse, sink)
            weight = tl.exp2(lse - now)
            mixed = mixed * weight[:, None] / (weight + tl.exp2(sink - now))[:, None]
        tl.store(
            out + place[:, None] * VALUE_WIDTH + dv[None, :],
            mixed.to(out.dtype.element_ty),
            mask=shown,
        )
    else:
        place = place * stretches + stretch
        tl.store(partial + place[:, None] * VALUE_WIDTH + dv[None, :], mixed, mask=shown)
        tl.store(partial_lse + place, lse, mask=real)


@triton.jit(do_not_specialize=["stretches"])
def merge_stretches(
    out,  # [T, H, Dv]
    partial,  # [T, H, X, Dv] fp32
    partial_lse,  # [T, H, X] fp32
    tile_first,  # [M] int32
    tile_rows,  # [M] int32
    reach,  # [T] int64
    first_seen,  # [T] int64
    sinks,  # [H] fp32
    stretches,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STRETCH: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_earlier(EARLY)
    member = tl.program_id(2)
    if member >= tl.load(tile_rows + tl.program_id(0)):
        return
    row = (tl.load(tile_first + tl.program_id(0)) + member).to(tl.int64)
    head = tl.program_id(1)
    place = row * HEADS + head
    dv = tl.arange(0, BLOCK_V)
    end = tl.load(reach + row).to(tl.int32) // STRETCH + 1
    if HAS_FIRST:
        begin = tl.load(first_seen + row).to(tl.int32) // STRETCH
    else:
        begin = 0
    highest = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    for stretch in range(begin, end):
        at = place * stretches + stretch
        lse = tl.load(partial_lse + at)
        mixed = tl.load(partial + at * VALUE_WIDTH + dv, mask=dv < VALUE_WIDTH, other=0.0)
        now = tl.maximum(highest, lse)
        base = tl.where(now == -float("inf"), 0.0, now)
        shrink = tl.exp2(highest - base)
        weight = tl.exp2(lse - base)
        acc = acc * shrink + mixed * weight
        total = total * shrink + weight
        highest = now
    if HAS_SINKS:
        sink = tl.load(sinks + head) * _LOG2_E
        now = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - now)
        acc = acc * shrink
        total = total * shrink + tl.exp2(sink - now)
    mixed = acc / total
    tl.store(out + place * VALUE_WIDTH + dv, mixed.to(out.dtype.element_ty), mask=dv < VALUE_WIDTH)


def paged_attention(
    query: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [slots, G, D]
    values: torch.Tensor,  # [slots, G, Dv]
    plan: AttentionPlan | RowPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H] a logit that joins the softmax and is dropped
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,  # [G] fp32 each, of fp8 keys, values
    one_size: bool = False,  # prompts in tiles of few rows, too
    config: AttentionConfig | None = None,  # the device's own, unless told
) -> torch.Tensor:  # [T, H, Dv]
    """softmax(scale · q kᵀ) v over each row's visible keys."""
    total, heads, width = query.shape
    kv_heads, value_width = values.shape[1:]
    if query.stride(2) != 1 or query.stride(1) != width:
        query = query.contiguous()
    config = config or attention_config(query.device, max(width, value_width))
    placed, first_seen = plan.placed, plan.first_seen(window)
    out = query.new_empty(total, heads, value_width)
    stretches = -(-placed.tables.shape[1] * PAGE_SIZE // config.split_keys)
    nothing = out  # for pointers that a variant does not follow
    sinks = None if sinks is None else sinks.float()
    bounds = placed.reach, nothing if first_seen is None else first_seen
    sizes = {
        "HEADS": heads,
        "VALUE_WIDTH": value_width,
        "BLOCK_V": max(16, triton.next_power_of_2(value_width)),
        "HAS_FIRST": first_seen is not None,
        "HAS_SINKS": sinks is not None,
    }
    fold = heads // kv_heads
    for tiles, most_rows in plan.tiles(0 if one_size else config.long_rows // fold):
        short = most_rows == TILE_ROWS
        split = short and stretches > 1
        partial, lse = nothing, nothing
        if split:
            shape = total, heads, stretches
            partial = query.new_empty(*shape, value_width, dtype=torch.float32)
            lse = query.new_empty(shape, dtype=torch.float32)
        stretch = config.split_keys if short else ALL_KEYS
        launch(
            attend_tiles,
            (len(tiles.first), kv_heads, stretches if split else 1),
            out, partial, lse, query, keys, values, *tiles, placed.tables, *bounds,
            nothing if sinks is None else sinks,
            *((nothing, nothing) if scales is None else scales),
            query.stride(0), placed.tables.shape[1], stretches,
            scale if softcap is not None else scale * LOG2_E,
            softcap or 0.0,
            **sizes,
            STRETCH=stretch, SPLIT=split, KV_HEADS=kv_heads, WIDTH=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_M=max(16, triton.next_power_of_2(most_rows * fold)),
            BLOCK_N=config.block_keys if short else config.long_block_keys, PAGE=PAGE_SIZE,
            HAS_SOFTCAP=softcap is not None, HAS_SCALES=scales is not None,
            WIDE=INTERPRETED and query.dtype == torch.bfloat16,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps if short else config.long_warps,
            num_stages=config.stages if short else config.long_stages, early=True,
        )  # fmt: skip
        if split:
            launch(
                merge_stretches, (len(tiles.first), heads, TILE_ROWS),
                out, partial, lse, tiles.first, tiles.rows, *bounds,
                nothing if sinks is None else sinks, stretches,
                **sizes, STRETCH=stretch, num_warps=1, early=True,
            )  # fmt: skip
    return out
