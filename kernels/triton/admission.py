"""Which drafted tokens to verify, on a GPU: the `ranked` search of dspark.scheduling.planner.

    c_j = σ(logit_j), clipped;  a_j = Π_{i≤j} σ(logit(c_i) / T_i + b_i)     (paper §3.2)

The `capacity` tokens that most probably survive are admitted. A token survives no more probably
than those before it, and of equals the earlier position goes first, then the earlier session: what
is admitted of a session is a prefix, and ties are settled by places, never by what was drafted.
Greedy sessions have T and b of their own.

One program for all: there are some thousand survivals at most.

Symbols: S sessions, B block size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.triton.launch import launch

MOST_TOKENS = 8192
LEAST, MOST = 1e-6, 1.0 - 1e-6  # as dspark.scheduling.survival clips


@triton.jit(do_not_specialize=["sessions", "size"])
def admit_kernel(
    admitted,  # [S] int64, out
    survivals,  # [S, B] fp32, out; -1 past a block's end
    logits,  # [S, B] fp32
    lengths,  # [S] int64
    greedy,  # [S] int64, 0 or 1
    temperatures,  # [2, B] fp32, of sessions that sample and of greedy ones
    biases,  # [2, B] fp32
    capacity,  # [1] int64
    sessions,
    size,
    BLOCK_S: tl.constexpr,  # powers of two
    BLOCK_B: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    session = tl.arange(0, BLOCK_S)
    position = tl.arange(0, BLOCK_B)
    length = tl.load(lengths + session, mask=session < sessions, other=0)
    length = tl.minimum(length, size)
    scale = tl.load(greedy + session, mask=session < sessions, other=0) * size
    there = position[None, :] < length[:, None]
    survival = tl.full([BLOCK_S, BLOCK_B], 1.0, tl.float64)
    least = tl.full([BLOCK_S], LEAST, tl.float64)  # written out, they would be fp32 numbers
    most = tl.full([BLOCK_S], MOST, tl.float64)
    for j in range(size):  # in order, so that no rounding makes a survival rise
        logit = tl.load(logits + session * size + j, mask=session < sessions, other=0.0)
        chance = 1.0 / (1.0 + tl.exp(-logit.to(tl.float64)))
        chance = tl.minimum(tl.maximum(chance, least), most)
        power = 1.0 / tl.load(temperatures + scale + j).to(tl.float64)
        bias = tl.load(biases + scale + j).to(tl.float64)
        # odds to the power of 1 / T, times e^b
        chance = 1.0 / (1.0 + tl.exp(power * tl.log((1.0 - chance) / chance) - bias))
        survival *= tl.where(position[None, :] >= j, chance[:, None], 1.0)
    shown = tl.where(there, survival, -1.0).to(tl.float32)
    place = session[:, None] * size + position[None, :]
    inside = (session < sessions)[:, None] & (position < size)[None, :]
    tl.store(survivals + place, shown, mask=inside)

    # As integers, floats of one sign have the same order; what is absent is below them.
    value = tl.where(there, shown.to(tl.int32, bitcast=True), -1)
    present = tl.sum(tl.sum(there.to(tl.int32), 1), 0)
    count = tl.minimum(tl.maximum(tl.load(capacity), 0), present.to(tl.int64)).to(tl.int32)
    edge = 0  # the largest value that `count` tokens reach
    for bit in range(30):  # 1.0 has no bit above
        tried = edge | (0x20000000 >> bit)
        reach = tl.sum(tl.sum((value >= tried).to(tl.int32), 1), 0)
        edge = tl.where(reach >= count, tried, edge)
    above = tl.sum((value > edge).to(tl.int32), 1)
    ties = count - tl.sum(above, 0)
    tied = there & (value == edge)
    turn = position[None, :] * BLOCK_S + session[:, None]
    low = 0  # among the ties, those before this turn are `ties` or fewer
    for bit in range(16):
        tried = low | (0x8000 >> bit)
        before = tl.sum(tl.sum((tied & (turn < tried)).to(tl.int32), 1), 0)
        low = tl.where(before <= ties, tried, low)
    taken = above + tl.sum((tied & (turn < low)).to(tl.int32), 1)
    taken = tl.where(count > 0, taken, 0)
    tl.store(admitted + session, taken.to(tl.int64), mask=session < sessions)


def admit(
    confidence_logits: torch.Tensor,  # [S, B] fp32
    lengths: torch.Tensor,  # [S] int64: tokens of each block
    greedy: torch.Tensor,  # [S] int64: 1 of greedy sessions, else 0
    temperatures: torch.Tensor,  # [2, B] fp32, above 0: of others, and of greedy ones
    biases: torch.Tensor,  # [2, B] fp32
    capacity: torch.Tensor,  # [1] int64: tokens to admit
) -> tuple[torch.Tensor, torch.Tensor]:  # [S] int64, [S, B] fp32
    """How many tokens of each session are admitted, and all survivals (-1: no token there)."""
    sessions, size = confidence_logits.shape
    if sessions * size > MOST_TOKENS:
        raise ValueError(
            f"at most {MOST_TOKENS} drafted tokens are admitted at once; got {sessions} × {size}"
        )
    admitted = lengths.new_empty(sessions)
    survivals = torch.empty_like(confidence_logits, memory_format=torch.contiguous_format)
    block_s, block_b = triton.next_power_of_2(sessions), triton.next_power_of_2(size)
    launch(
        admit_kernel,
        (1 if sessions else 0,),
        admitted, survivals, confidence_logits.contiguous(), lengths, greedy,
        temperatures.contiguous(), biases.contiguous(), capacity,
        sessions, size,
        BLOCK_S=block_s, BLOCK_B=block_b, LEAST=LEAST, MOST=MOST,
        num_warps=min(16, max(1, block_s * block_b // 256)),
    )  # fmt: skip
    return admitted, survivals
