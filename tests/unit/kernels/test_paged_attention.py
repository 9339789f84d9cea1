"""Attention over pages against plain attention, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.kernels.attention_plan import PAGE_SIZE, plan_attention
from dspark.kernels.reference.paged_attention import paged_attention

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
SLOTS = 640

# (keys before the step, rows in it): single rows, blocks, and chunks long enough to go alone
sequences = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.integers(1, 9), st.integers(15, 40))),
    min_size=1,
    max_size=4,
)
variants = st.fixed_dictionaries(
    {},
    optional={
        "window": st.integers(1, 30),
        "softcap": st.floats(0.5, 5.0),
        "sinks": st.just(torch.tensor([0.5, -2.0, 3.0, 0.0])),
    },
)


def plain(
    query: torch.Tensor,  # [Q, H, D]
    keys: torch.Tensor,  # [L, G, D], of which the last Q are the rows' own
    values: torch.Tensor,  # [L, G, Dv]
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # [Q, H, Dv]
    keys, values = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,lhd->hql", query, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows, length = query.shape[0], keys.shape[0]
    distance = torch.arange(length - rows, length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, rows, 1)], dim=-1)
    return torch.einsum("hql,lhd->qhd", scores.softmax(-1)[..., :length], values)


@given(sequences, variants, st.integers(0, 2**31))
def test_every_sequence_is_attended_to_as_if_alone(
    shapes: list[tuple[int, int]], options: dict[str, Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(rows for _, rows in shapes), HEADS, WIDTH, generator=generator) * 2
    keys = torch.randn(SLOTS, KV_HEADS, WIDTH, generator=generator)
    values = torch.randn(SLOTS, KV_HEADS, VALUE_WIDTH, generator=generator)
    free = torch.randperm(SLOTS // PAGE_SIZE - 1, generator=generator).numpy().astype("int32") + 1
    pages, want, first = [], [], 0
    for before, rows in shapes:
        need = -(-(before + rows) // PAGE_SIZE)
        own, free = free[:need], free[need:]
        pages.append(own)
        slots = (own[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[: before + rows]
        want.append(
            plain(query[first : first + rows], keys[slots], values[slots], scale=0.3, **options)
        )
        first += rows
    plan = plan_attention(pages, [before for before, _ in shapes], [rows for _, rows in shapes])
    got = paged_attention(query, keys, values, plan, scale=0.3, **options)
    # fp32; the two sum in other orders
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", [{"window": 3}, {"softcap": 0.5}, {"sinks": torch.ones(HEADS)}])
def test_every_option_makes_a_difference(option: dict[str, Any]) -> None:
    query, keys, values = torch.randn(
        3, 9, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    keys, values = keys[:, :KV_HEADS], values[:, :KV_HEADS]
    plan = plan_attention([np.zeros(1, dtype=np.int32)], [0], [9])
    with_it = paged_attention(query, keys, values, plan, scale=1.0, **option)
    without = paged_attention(query, keys, values, plan, scale=1.0)
    assert (with_it - without).abs().max() > 0.1


@given(sequences, st.integers(1, 30), st.none() | st.integers(1, 30))
def test_rows_of_a_block_see_each_other_and_a_window_before_it(
    shapes: list[tuple[int, int]], window: int, sliding: int | None
) -> None:
    """Queries of nothing attend evenly, so that values tell who was seen.

    The plan's window is the block's, the layer's is each row's own.
    """
    need = [-(-(before + rows) // PAGE_SIZE) for before, rows in shapes]
    ends = np.cumsum(need) + 1
    pages = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(need, ends, strict=True)]
    plan = plan_attention(
        pages, [b for b, _ in shapes], [n for _, n in shapes], block=True, window=window + 5
    )
    query = torch.zeros(len(plan.positions), HEADS, WIDTH)
    keys = torch.zeros(int(ends[-1]) * PAGE_SIZE, KV_HEADS, WIDTH)
    values = torch.zeros(len(keys), KV_HEADS, 1)
    for (before, rows), own in zip(shapes, pages, strict=True):
        at = (own[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[: before + rows]
        values[at] = torch.arange(before + rows).float()[:, None, None]
    got = paged_attention(query, keys, values, plan, scale=1.0, window=sliding)
    want = []
    for before, rows in shapes:
        for at in range(before, before + rows):
            low = max(0, before + rows - window - 5, at + 1 - (sliding or at + 1))
            want.append((low + before + rows - 1) / 2)
    torch.testing.assert_close(got[:, 0, 0], torch.tensor(want), atol=1e-3, rtol=1e-4)
