"""Rows that are each a sequence of its own attend as their sequences do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan, RowPlan, plan_attention
from dspark.kernels.reference.paged_attention import paged_attention
from dspark.kernels.reference.row_attention import row_attention

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
SLOTS = 640

sequences = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4)
variants = st.fixed_dictionaries(
    {},
    optional={
        "window": st.integers(1, 30),
        "softcap": st.floats(0.5, 5.0),
        "sinks": st.just(torch.tensor([0.5, -2.0, 3.0, 0.0])),
    },
)


def by_rows(plan: AttentionPlan, padding: int = 0, spare_pages: int = 0) -> RowPlan:
    """The same rows, each with the pages of its sequence; then rows of nobody's."""
    of = torch.from_numpy(np.repeat(np.arange(len(plan.row_counts)), plan.row_counts))
    rows, width = len(of), plan.tables.shape[1]
    tables = torch.zeros(rows + padding, width + spare_pages, dtype=torch.int32)
    tables[:rows, :width] = plan.tables[of]
    nothing = torch.zeros(padding, dtype=torch.int64)
    return RowPlan(
        *(torch.cat([t, nothing]) for t in (plan.positions, plan.reach, plan.slots)),
        tables,
        tile_rows=torch.ones(rows + padding, dtype=torch.int32),
        window=plan.window,
    )


@given(
    sequences, variants, st.booleans(), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**31)
)
def test_rows_attend_as_their_sequences_do(
    shapes: list[tuple[int, int]],
    options: dict[str, Any],
    block: bool,
    padding: int,
    spare_pages: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    need = [-(-(before + rows) // PAGE_SIZE) for before, rows in shapes]
    free = torch.randperm(SLOTS // PAGE_SIZE - 1, generator=generator).numpy().astype("int32") + 1
    ends = np.cumsum(need)
    pages = [free[end - n : end] for n, end in zip(need, ends, strict=True)]
    plan = plan_attention(pages, [b for b, _ in shapes], [n for _, n in shapes], block=block)
    # What nobody has written may be anything: a masked NaN would spread.
    keys = torch.full((SLOTS, KV_HEADS, WIDTH), float("nan"))
    values = torch.full((SLOTS, KV_HEADS, VALUE_WIDTH), float("nan"))
    for (before, rows), own in zip(shapes, pages, strict=True):
        slots = (own[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[: before + rows]
        keys[slots] = torch.randn(len(slots), KV_HEADS, WIDTH, generator=generator)
        values[slots] = torch.randn(len(slots), KV_HEADS, VALUE_WIDTH, generator=generator)
    keys[0] = values[0] = 0.0
    rows = len(plan.positions)
    query = torch.randn(rows + padding, HEADS, WIDTH, generator=generator) * 2
    want = paged_attention(query[:rows], keys, values, plan, scale=0.3, **options)
    padded = by_rows(plan, padding, spare_pages)
    got = row_attention(query, keys, values, padded, scale=0.3, **options)
    # fp32; the two sum in other orders
    torch.testing.assert_close(got[:rows], want, atol=1e-5, rtol=1e-4)
    assert not got[rows:].any(), "padding reads the zeros of slot 0"


@pytest.mark.parametrize("option", [{"window": 3}, {"softcap": 0.5}, {"sinks": torch.ones(HEADS)}])
def test_every_option_makes_a_difference(option: dict[str, Any]) -> None:
    query, keys, values = torch.randn(
        3, 9, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    keys, values = keys[:, :KV_HEADS], values[:, :KV_HEADS]
    plan = plan_attention([np.zeros(1, dtype=np.int32)], [0], [9])
    # this one sequence lies in page 0, so that its first position is what the others would pad with
    values = torch.cat([values, values.new_zeros(PAGE_SIZE - 9, *values.shape[1:])])
    keys = torch.cat([keys, keys.new_zeros(PAGE_SIZE - 9, *keys.shape[1:])])
    with_it = row_attention(query, keys, values, by_rows(plan), scale=1.0, **option)
    without = row_attention(query, keys, values, by_rows(plan), scale=1.0)
    assert (with_it - without).abs().max() > 0.1


def test_the_mask_of_a_window_is_made_once_for_all_layers() -> None:
    plan = by_rows(plan_attention([np.array([1, 2], dtype=np.int32)], [17], [3]))
    query = torch.zeros(3, HEADS, WIDTH)
    cache = torch.zeros(3 * PAGE_SIZE, KV_HEADS, WIDTH)
    for window in (None, 5, None, 5):
        row_attention(query, cache, cache, plan, scale=1.0, window=window)
    made = dict(plan.derived)
    assert len(made) == 3, "two masks, and where the window begins"
    row_attention(query, cache, cache, plan, scale=1.0, window=5)
    assert all(plan.derived[key] is value for key, value in made.items())
