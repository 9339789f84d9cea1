"""dspark.decoding.noise in kernels: the same words to the bit, and numbers made alike of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def word(key, counter):
    """The counter-th output of the stream that starts at `key`: uint64."""
    x = key.to(tl.uint64) + counter.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def unit(words):
    """A uniform number of each word, in (0, 1): fp64, of 52 bits and a half."""
    return ((words >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def gumbel(key, token):
    """Standard Gumbel noise of each (key, token): fp64."""
    return -tl.log(-tl.log(unit(word(key, token + 1))))
