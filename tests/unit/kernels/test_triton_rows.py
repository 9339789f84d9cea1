"""Triton's norms, gates, rotary writes and products against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from dspark.kernels.triton.cache_write import rotate_write
from dspark.kernels.triton.linear import NARROW_ROWS, linear, narrow_linear
from dspark.kernels.triton.rows import add_rms_norm, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result, at most another of what is added before; fp32 sums in other orders.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
types = st.sampled_from(list(TOLERANCES))
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@settings(max_examples=25)
@given(st.integers(1, 5), st.sampled_from([1, 7, 96, 300]), types, st.booleans(), seeds)
def test_norms_with_the_addition_before_them(
    rows: int, width: int, dtype: torch.dtype, adds: bool, seed: int
) -> None:
    x, delta, weight = (normal(seed + i, rows, width, dtype=dtype) for i in range(3))
    residual, weight = x.clone(), weight[0]
    got = add_rms_norm(residual, delta if adds else None, weight, 1e-5)
    kept = x + delta if adds else x
    if dtype == torch.bfloat16:  # which the interpreter cuts off where it should round
        torch.testing.assert_close(residual, kept, atol=0.0, rtol=2**-7)
    else:
        assert torch.equal(residual, kept)
    check(got, rms_norm(residual.float(), weight.float(), 1e-5), dtype)


@settings(max_examples=15)
@given(st.integers(1, 4), st.sampled_from([1, 24, 1100]), types, seeds)
def test_the_gate_of_the_mlp(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = 5.0 * normal(seed, rows, 2 * width, dtype=dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    got = silu_mul(gate_up)
    torch.testing.assert_close(got.float(), F.silu(gate) * up, atol=1e-4, rtol=TOLERANCES[dtype])


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.sampled_from([(4, 2, 16), (3, 1, 24), (9, 3, 64), (2, 2, 80)]),
    types,
    st.booleans(),
    seeds,
)
def test_rotary_embedding_with_norms_and_the_write(
    rows: int, shape: tuple[int, int, int], dtype: torch.dtype, normed: bool, seed: int
) -> None:
    heads, kv_heads, width = shape
    qkv = normal(seed, rows, (heads + 2 * kv_heads) * width, dtype=dtype)
    norms = tuple(1.0 + 0.1 * normal(seed + i, width) for i in (1, 2))
    angles = 3.0 * normal(seed + 3, rows, width // 2)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:rows].to(DEVICE)
    keys, values = (torch.zeros(20, kv_heads, width, dtype=dtype, device=DEVICE) for _ in range(2))

    parts = qkv.float().view(rows, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    turned = []
    for part, norm in zip(parts[:2], norms, strict=True):
        x = rms_norm(part, norm.to(dtype).float(), 1e-6) if normed else part
        low, high = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turned.append(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))

    ours = qkv.clone()
    rotate_write(
        ours, angles.cos(), angles.sin(),
        (norms[0].to(dtype), norms[1].to(dtype)) if normed else None,
        1e-6, keys, values, slots,
    )  # fmt: skip
    check(ours.view(rows, -1, width)[:, :heads], turned[0], dtype)
    check(keys[slots], turned[1], dtype)
    assert torch.equal(values[slots].float(), parts[2])
    others = torch.ones(20, dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert not keys[others].any()
    assert not values[others].any()


@settings(max_examples=15)
@given(
    st.sampled_from([1, 3, 64, 70]), st.sampled_from([(16, 8), (130, 33), (256, 100)]), types,
    st.booleans(), seeds,
)  # fmt: skip
def test_products_and_that_rows_do_not_depend_on_others(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool, seed: int
) -> None:
    inputs, outputs = shape
    x = normal(seed, rows, inputs, dtype=dtype)
    weight = normal(seed + 1, outputs, inputs, dtype=dtype) / inputs**0.5
    bias = normal(seed + 2, outputs, dtype=dtype) if biased else None
    got = linear(x, weight, bias)
    want = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    check(got, want, dtype)
    assert torch.equal(linear(x[-1:], weight, bias), got[-1:])


@settings(max_examples=25)
@given(
    st.integers(1, NARROW_ROWS), st.sampled_from([(16, 8), (128, 64), (130, 33), (256, 100)]),
    types, st.booleans(), seeds,
)  # fmt: skip
def test_products_of_few_rows_and_that_their_number_does_not_matter(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool, seed: int
) -> None:
    inputs, outputs = shape
    x = normal(seed, NARROW_ROWS, inputs, dtype=dtype)
    weight = normal(seed + 1, outputs, inputs, dtype=dtype) / inputs**0.5
    bias = normal(seed + 2, outputs, dtype=dtype) if biased else None
    got = narrow_linear(x[:rows], weight, bias)
    want = F.linear(x[:rows].float(), weight.float(), None if bias is None else bias.float())
    check(got, want, dtype)
    assert torch.equal(got, narrow_linear(x, weight, bias)[:rows])
    assert torch.equal(got[-1:], narrow_linear(x[rows - 1 : rows], weight, bias))


def test_a_product_of_no_rows() -> None:
    assert narrow_linear(normal(0, 0, 16), normal(1, 8, 16)).shape == (0, 8)
