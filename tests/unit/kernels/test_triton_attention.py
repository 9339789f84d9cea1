"""Triton's attention over pages against the torch reference, under the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.kernels.attention_plan import (
    PAGE_SIZE,
    TILE_ROWS,
    AttentionPlan,
    RowPlan,
    cut_into_tiles,
    plan_attention,
)
from dspark.kernels.reference.paged_attention import paged_attention as reference

pytest.importorskip("triton")
from dspark.kernels.triton.attention import paged_attention
from dspark.kernels.triton.cache_write import write_rows
from dspark.kernels.triton.launch_configs import AttentionConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Stretches of two pages, so that short contexts cross their bounds.
SMALL = AttentionConfig(32, 16, 4, 1, long_rows=32, long_block_keys=16, long_warps=4, long_stages=1)
# The two sum in other orders, fp32 throughout; the others round weights to their type, and results.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

sequences = st.lists(
    st.tuples(st.integers(0, 50), st.one_of(st.integers(1, 9), st.integers(15, 30))),
    min_size=1,
    max_size=3,
)
heads = st.sampled_from([(4, 4), (4, 2), (3, 1), (7, 1), (16, 1)])
widths = st.sampled_from([(16, 16), (24, 16), (64, 64), (80, 80), (128, 128)])
types = st.sampled_from(list(TOLERANCES))


@dataclass
class Case:
    """A step over a cache of which nobody has written the rest."""

    plan: AttentionPlan
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(
        cls,
        shapes: list[tuple[int, int]],
        heads: tuple[int, int] = (4, 2),
        widths: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
        *,
        block: bool = False,
        window: int | None = None,
        seed: int = 0,
    ) -> Case:
        """Pages are dealt at random; what was not written is NaN, but for the zeros of slot 0."""
        generator = torch.Generator().manual_seed(seed)
        need = [-(-(before + rows) // PAGE_SIZE) for before, rows in shapes]
        slots = (sum(need) + 3) * PAGE_SIZE
        free = torch.randperm(sum(need) + 2, generator=generator).numpy().astype("int32") + 1
        ends = np.cumsum(need)
        pages = [free[end - n : end] for n, end in zip(need, ends, strict=True)]
        plan = plan_attention(
            pages, [b for b, _ in shapes], [n for _, n in shapes], DEVICE,
            block=block, window=window,
        )  # fmt: skip
        keys = torch.full((slots, heads[1], widths[0]), float("nan"))
        values = torch.full((slots, heads[1], widths[1]), float("nan"))
        for (before, rows), own in zip(shapes, pages, strict=True):
            at = (own[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[: before + rows]
            keys[at] = torch.randn(len(at), heads[1], widths[0], generator=generator)
            values[at] = torch.randn(len(at), heads[1], widths[1], generator=generator)
        keys[0] = values[0] = 0.0
        query = torch.randn(len(plan.positions), heads[0], widths[0], generator=generator) * 2
        moved = (t.to(DEVICE, dtype) for t in (query, keys, values))
        return cls(plan, *moved)

    def in_rows(self, padding: int) -> tuple[torch.Tensor, RowPlan]:
        """The same step in the padded shape that graphs have."""
        counts = np.asarray(self.plan.row_counts)
        of = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        rows, width = len(of), self.plan.tables.shape[1]
        tables = torch.zeros(rows + padding, width + 1, dtype=torch.int32)
        tables[:rows, :width] = self.plan.tables[of]
        tile_rows = torch.ones(rows + padding, dtype=torch.int32)
        tile_rows[:rows] = 0
        first, count, _ = cut_into_tiles(counts, np.arange(len(counts)), TILE_ROWS)
        tile_rows[torch.from_numpy(first).long()] = torch.from_numpy(count)
        nothing = torch.zeros(padding, dtype=torch.int64)
        plan = self.plan
        lines = [torch.cat([t, nothing]) for t in (plan.positions, plan.reach, plan.slots)]
        moved = [t.to(DEVICE) for t in (*lines, tables, tile_rows)]
        query = torch.cat([self.query, self.query.new_zeros(padding, *self.query.shape[1:])])
        return query, RowPlan(*moved, window=plan.window)


def options_for(case: Case, window: int | None, softcap: float | None, sinks: bool) -> Any:
    logits = torch.linspace(-2.0, 3.0, case.query.shape[1], device=DEVICE)
    return {
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
        "sinks": logits if sinks else None,
    }


@settings(max_examples=20)
@given(
    sequences, heads, widths, types, st.booleans(), st.none() | st.integers(1, 90),
    st.none() | st.integers(1, 60), st.none() | st.floats(0.5, 5.0), st.booleans(),
    st.integers(0, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_the_reference(
    shapes: list[tuple[int, int]], heads: tuple[int, int], widths: tuple[int, int],
    dtype: torch.dtype, block: bool, plan_window: int | None, window: int | None,
    softcap: float | None, sinks: bool, padding: int, seed: int,
) -> None:  # fmt: skip
    if block and plan_window is not None:
        plan_window += 40  # a block sees at least itself
    case = Case.of(shapes, heads, widths, dtype, block=block, window=plan_window, seed=seed)
    options = options_for(case, window, softcap, sinks)
    fine = (t.float() for t in (case.query, case.keys, case.values))
    want = reference(*fine, case.plan, **options)
    tolerance = TOLERANCES[dtype]
    got = paged_attention(case.query, case.keys, case.values, case.plan, config=SMALL, **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)
    if max(rows for _, rows in shapes) <= 16:
        query, rows = case.in_rows(padding)
        padded = paged_attention(query, case.keys, case.values, rows, config=SMALL, **options)
        assert torch.equal(padded[: len(got)], got), "a row's sum does not depend on the shape"
        assert not padded[len(got) :].any(), "padding reads the zeros of slot 0"


@pytest.mark.parametrize("sinks", [False, True])
def test_what_comes_out_does_not_depend_on_the_rest_of_the_step(sinks: bool) -> None:
    """To the bit, though the step's longest sequence decides how many stretches there are."""
    short, long = Case.of([(9, 5)], seed=1), Case.of([(200, 8)], seed=2)
    options = options_for(short, None, None, sinks)
    alone = paged_attention(
        short.query, short.keys, short.values, short.plan, config=SMALL, **options
    )
    offset = len(long.keys) // PAGE_SIZE
    pages = [case.plan.tables[0].numpy() for case in (long, short)]
    plan = plan_attention([pages[0], pages[1] + offset], [200, 9], [8, 5], DEVICE)
    both = paged_attention(
        torch.cat([long.query, short.query]),
        torch.cat([long.keys, short.keys]),
        torch.cat([long.values, short.values]),
        plan,
        config=SMALL,
        **options,
    )
    assert torch.equal(both[8:], alone)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_every_head_width_runs_in_its_own_configuration(width: int) -> None:
    case = Case.of([(530, 3), (3, 1)], (4, 1), (width, width), torch.float16)
    options = options_for(case, None, None, False)
    fine = (t.float() for t in (case.query, case.keys, case.values))
    want = reference(*fine, case.plan, **options)
    got = paged_attention(case.query, case.keys, case.values, case.plan, **options)
    torch.testing.assert_close(got.float(), want, atol=4e-3, rtol=4e-3)


def test_scores_of_any_size_are_no_trouble() -> None:
    case = Case.of([(40, 9)], seed=3)
    case.query *= 1e3
    want = reference(case.query, case.keys, case.values, case.plan, scale=1.0)
    got = paged_attention(case.query, case.keys, case.values, case.plan, scale=1.0, config=SMALL)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_fp8_keys_and_values_are_scaled_back() -> None:
    case = Case.of([(40, 9), (5, 1)], seed=4)
    options = options_for(case, None, None, False)
    scales = tuple(torch.tensor(each, device=DEVICE) for each in ([2**-4, 2**-5], [2**-5, 2**-6]))
    slots = torch.arange(len(case.keys), device=DEVICE)
    keys, values = (
        torch.zeros(t.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
        for t in (case.keys, case.values)
    )
    # Values that fp8 has: the interpreter rounds others wrongly where a carry reaches the exponent.
    back = [
        (torch.nan_to_num(t, nan=0.0) / s[:, None]).to(keys.dtype).float() * s[:, None]
        for t, s in zip((case.keys, case.values), scales, strict=True)
    ]
    write_rows(*back, keys, values, slots, scales)
    for stored, want, scale in zip((keys, values), back, scales, strict=True):
        assert torch.equal(stored.float() * scale[:, None], want)
    want = reference(case.query, *back, case.plan, **options)
    got = paged_attention(
        case.query, keys, values, case.plan, scales=scales, config=SMALL, **options
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.sampled_from([(1, 16, 16), (3, 24, 16), (2, 80, 80)]), types)
@settings(max_examples=15)
def test_rows_are_written_to_their_slots_and_nowhere_else(
    rows: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    kv_heads, width, value_width = shape
    generator = torch.Generator().manual_seed(rows)
    slots = torch.randperm(32, generator=generator)[:rows].to(DEVICE)
    # as modules give them: heads first
    keys = torch.randn(kv_heads, rows, width, generator=generator).to(DEVICE, dtype).transpose(0, 1)
    values = torch.randn(rows, kv_heads, value_width, generator=generator).to(DEVICE, dtype)
    to_keys = torch.zeros(32, kv_heads, width, dtype=dtype, device=DEVICE)
    to_values = torch.zeros(32, kv_heads, value_width, dtype=dtype, device=DEVICE)
    want = to_keys.index_copy(0, slots, keys), to_values.index_copy(0, slots, values)
    write_rows(keys, values, to_keys, to_values, slots)
    assert torch.equal(to_keys, want[0])
    assert torch.equal(to_values, want[1])
