"""The draws of dspark.decoding.noise on a GPU: the same words, to the bit, for the same keys."""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(words):  # uint64 -> uint64
    """SplitMix64's mixer."""
    words = (words ^ (words >> 30)) * _MIX1
    words = (words ^ (words >> 27)) * _MIX2
    return words ^ (words >> 31)


@triton.jit
def word(key, counter):  # int64, int64 -> uint64
    """The counter-th output of the stream that starts at `key`."""
    return mix(key.to(tl.uint64, bitcast=True) + counter.to(tl.uint64, bitcast=True) * _GOLDEN)


@triton.jit
def unit(words):  # uint64 -> float64 in (0, 1)
    """The centre of the cell that the upper 52 bits name."""
    return ((words >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52


@triton.jit
def uniform(keys):  # int64 -> float64
    """One uniform a key."""
    return unit(mix(keys.to(tl.uint64, bitcast=True)))


@triton.jit
def gumbel(key, token_ids):  # int64, int64 -> float64
    """Standard Gumbel noise for each token under a key."""
    return -tl.log(-tl.log(unit(word(key, token_ids + 1))))
