"""The C++ operators against torch, and each row against itself alone."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dspark.kernels.attention_plan import PAGE_SIZE, plan_attention
from dspark.kernels.cpu import operators
from dspark.kernels.dispatch import CpuStore, RowStore

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs AVX2 and a C++ compiler")

PAGES = 40
seeds = st.integers(0, 2**31)
# (tokens before the step, rows in it)
sequences = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=4)
variants = st.fixed_dictionaries(
    {},
    optional={
        "window": st.integers(1, 50),
        "softcap": st.floats(0.5, 5.0),
        "sinks": st.just(torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, -1.0])),
    },
)


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


@given(
    sequences,
    variants,
    st.sampled_from(operators.HEAD_WIDTHS),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    seeds,
)
def test_attention_is_that_of_the_reference(
    shapes: list[tuple[int, int]],
    options: dict[str, Any],
    width: int,
    groups: int,
    block: bool,
    seed: int,
) -> None:
    heads, total = 6, sum(rows for _, rows in shapes)
    query = random(seed, total, heads, width)
    free = (torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    fast = CpuStore(PAGES, groups, width)
    slow = RowStore(
        PAGES * PAGE_SIZE, torch.empty(0, groups, width), torch.empty(0, groups, width),
        torch.device("cpu"),
    )  # fmt: skip
    tables = []
    for i, (before, rows) in enumerate(shapes):
        length = before + rows
        pages = torch.tensor([free.pop() for _ in range(-(-length // PAGE_SIZE))])
        own = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
        keys, values = (random(seed + 1 + 2 * i + j, length, groups, width) for j in range(2))
        fast.write(keys, values, own)
        slow.write(keys.float(), values.float(), own)
        tables.append(pages.numpy().astype("int32"))
    plan = plan_attention(
        tables, [before for before, _ in shapes], [rows for _, rows in shapes], block=block
    )
    settings = {"window": None, "softcap": None, "sinks": None, **options}
    got = fast.attend(query, plan, scale=width**-0.5, **settings)
    want = slow.attend(query.float(), plan, scale=width**-0.5, **settings)
    # weights and results are rounded to bf16: 2^-8 of values of a few units
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.02)
    # alone, each row gives the same bits
    at = int(torch.randint(0, total, (1,), generator=torch.Generator().manual_seed(seed)))
    of = next(i for i in range(len(shapes)) if at < int(plan.row_starts[i + 1]))
    row = slice(at, at + 1)
    lone = plan_attention([tables[of]], [int(plan.reach[at])], [1])
    lone = replace(lone, positions=plan.positions[row])  # a window is counted from there
    assert torch.equal(fast.attend(query[row], lone, scale=width**-0.5, **settings), got[row])


@given(st.integers(0, 40), st.integers(1, 200), st.integers(1, 64), st.booleans(), seeds)
def test_linear_layers(rows: int, outputs: int, half: int, biased: bool, seed: int) -> None:
    x, weight = random(seed, rows, 2 * half), random(seed + 1, outputs, 2 * half)
    bias = random(seed + 2, outputs) if biased else None
    packed = operators.pack_linear(weight)
    packed_bias = None if bias is None else operators.pack_bias(bias)
    got = operators.linear(x, packed, packed_bias, outputs, torch.float32)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    assert torch.equal(operators.linear(x, packed, packed_bias, outputs), got.bfloat16())
    for i in range(rows):
        alone = operators.linear(x[i : i + 1], packed, packed_bias, outputs, torch.float32)
        assert torch.equal(alone[0], got[i])


@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), seeds)
def test_norms(rows: int, lanes: int, added: bool, seed: int) -> None:
    width = lanes * operators.LANES
    residual, weight = random(seed, rows, width), random(seed + 1, width)
    delta = random(seed + 2, rows, width) if added else None
    total = residual if delta is None else (residual.float() + delta.float()).bfloat16()
    got = operators.add_rms_norm(residual, delta, weight, 1e-5)
    assert torch.equal(residual, total)
    want = F.rms_norm(total.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=2**-8)


@given(st.integers(1, 40), st.integers(1, 8), seeds)
def test_the_gate(rows: int, lanes: int, seed: int) -> None:
    gate_up = random(seed, rows, 2 * lanes * operators.LANES, scale=30.0)
    gate, up = gate_up.double().chunk(2, dim=-1)
    got = operators.silu_mul(gate_up).double()
    torch.testing.assert_close(got, F.silu(gate) * up, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("normed", [False, True])
@given(st.integers(1, 20), st.sampled_from(operators.HEAD_WIDTHS), seeds)
def test_rotation_and_where_it_goes(normed: bool, rows: int, width: int, seed: int) -> None:
    heads, groups = 4, 2
    qkv = random(seed, rows, (heads + 2 * groups) * width)
    norms = (random(seed + 1, width), random(seed + 2, width)) if normed else None
    angles = torch.rand(rows, width // 2, generator=torch.Generator().manual_seed(seed)) * 9
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(seed))[:rows]
    parts = qkv.view(rows, -1, width).split([heads, groups, groups], dim=1)
    query, key, value = (part.double() for part in parts)
    if norms is not None:
        # rounded between norm and rotation, as the modules do
        query = F.rms_norm(query, (width,), norms[0].double(), 1e-6).bfloat16().double()
        key = F.rms_norm(key, (width,), norms[1].double(), 1e-6).bfloat16().double()
    cos, sin = (f(angles.double()).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    turn = torch.cat([-torch.ones(width // 2), torch.ones(width // 2)])
    query, key = (x * cos + x.roll(width // 2, -1) * turn * sin for x in (query, key))
    store = CpuStore(5, groups, width)
    operators.rotate_write(
        qkv, angles.cos(), angles.sin(), norms, 1e-6, store.keys, store.values, slots, heads, width
    )
    got = qkv[:, : heads * width].view(rows, heads, width).double()
    torch.testing.assert_close(got, query, atol=0.02, rtol=2**-7)
    pages, at = slots // PAGE_SIZE, slots % PAGE_SIZE
    keys = store.keys.view(5, groups, width // 2, PAGE_SIZE, 2)[pages, :, :, at].flatten(2)
    values = store.values.view(5, groups, PAGE_SIZE // 2, width, 2)[pages, :, at // 2, :, at % 2]
    torch.testing.assert_close(keys.double(), key, atol=0.02, rtol=2**-7)
    assert torch.equal(values.double(), value)


def test_what_does_not_fit_is_refused_before_it_is_touched() -> None:
    x, weight = random(0, 2, 32), random(1, 32)
    for wrong in (x.float(), x[:, :31], x.T):
        with pytest.raises(ValueError, match="expected a contiguous"):
            operators.add_rms_norm(wrong, None, weight, 1e-5)
    store = CpuStore(2, 2, 32)
    plan = plan_attention([np.ones(1, dtype=np.int32)], [0], [1])
    with pytest.raises(ValueError, match="3 heads of 32 over 2"):
        operators.attention(random(0, 1, 96), store.keys, store.values, plan, 3, 32, scale=1.0)


def test_threads_that_were_moved_apart_may_go_anywhere() -> None:
    """However they lay, each may run on every CPU afterwards, and they compute."""
    allowed = os.sched_getaffinity(0)
    x, weight = random(0, 8, 64), random(1, 640, 64)
    packed = operators.pack_linear(weight)
    want = operators.linear(x, packed, None, 640)  # the helpers exist from here on
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    one = {min(allowed)}
    for thread in threads:
        os.sched_setaffinity(thread, one)
    operators.linear(x, packed, None, 640)
    for thread in threads:
        os.sched_setaffinity(thread, allowed)
    operators.spread_threads()
    assert all(os.sched_getaffinity(thread) == allowed for thread in threads)
    assert torch.equal(operators.linear(x, packed, None, 640), want)
