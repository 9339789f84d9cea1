"""Steps in padded shapes say what steps as they are say: here run without being captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.steps import STEPS, Cache
from helpers.tiny import TAPS, hf_model
from hypothesis import given
from hypothesis import strategies as st

from dspark.kernels.attention_plan import PAGE_SIZE, pages_for, plan_attention
from dspark.kernels.dispatch import RowStore
from dspark.models import graphs
from dspark.models.graphs import GATHERING, KERNELS, MODULES, Padding
from dspark.models.target import TargetModel

SLIDING = {"sliding_window": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": SLIDING,
    "gemma2": {**SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def target_of(family: str, padded: bool) -> TargetModel:
    return TargetModel(hf_model(family, vocab=64, **FAMILIES[family]), TAPS, padded=padded)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_steps_say_the_same(family: str) -> None:
    plain, padded = target_of(family, False), target_of(family, True)
    a, b = Cache(), Cache()
    for rows in STEPS:
        want, got = a.step(plain, rows), b.step(padded, rows)
        # fp32; the two sum keys in other orders
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.taps, want.taps, atol=1e-4, rtol=1e-4)
    assert padded.padded is not None
    assert padded.padded.graphs(b.kv) == 3  # 4, 16 and 24 rows


@pytest.mark.parametrize("without", [{"sliding_window": None}, {"attn_logit_softcapping": None}])
def test_the_comparison_notices_what_is_left_out(without: dict[str, Any]) -> None:
    plain = target_of("gemma2", False)
    other = TargetModel(hf_model("gemma2", vocab=64, **FAMILIES["gemma2"] | without), padded=True)
    a, b = Cache(), Cache()
    worst = [(a.step(plain, r).logits - b.step(other, r).logits).abs().max() for r in STEPS]
    assert max(worst[1:]) > 0.01


PLAIN, PADDED = target_of("llama", False), target_of("llama", True)
steps = st.lists(st.tuples(*[st.integers(0, 9)] * 4).filter(any), min_size=1, max_size=5)


@given(steps, st.data(), st.integers(0, 2**31))
def test_any_rows_and_any_logits(
    rows_of: list[tuple[int, ...]], data: st.DataObject, seed: int
) -> None:
    a, b = Cache(seed), Cache(seed)
    for cache in (a, b):
        cache.step(PLAIN, (1, 1, 1, 1))  # memory first
    outputs = []
    for rows in rows_of:
        wanted = data.draw(st.lists(st.integers(0, sum(rows) - 1), unique=True).map(sorted))
        logit_rows = torch.tensor(wanted, dtype=torch.int64)
        outputs.append((a.step(PLAIN, rows, logit_rows), b.step(PADDED, rows, logit_rows)))
    # compared at the end: no step may write over what an earlier one said
    for want, got in outputs:
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.taps, want.taps, atol=1e-4, rtol=1e-4)
    for layer in range(3):
        store = b.kv.layer(layer)
        assert isinstance(store, RowStore)
        assert not store.keys[0].any(), "slot 0 pads what is read: it stays zero"
        assert not store.values[0].any()


def test_padding_writes_to_nobodys_slots() -> None:
    cache = Cache()
    cache.step(PADDED, (20, 5, 7, 30))
    store = cache.kv.layer(1)
    assert isinstance(store, RowStore)
    before = store.keys.clone()
    cache.step(PADDED, (1, 1, 1, 0))  # of four rows one is padding
    changed = (store.keys != before).flatten(1).any(1).nonzero().flatten().tolist()
    own = [
        int(cache.pages[s][done // PAGE_SIZE]) * PAGE_SIZE + done % PAGE_SIZE
        for s, done in enumerate((20, 5, 7))
    ]
    assert sorted(changed) == sorted([graphs.NOWHERE, *own])


paddings = st.sampled_from((GATHERING, MODULES, KERNELS))


@given(
    paddings,
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 40)), min_size=1, max_size=50),
)
def test_a_shape_is_no_smaller_than_its_step(
    padding: Padding, shapes: list[tuple[int, int]]
) -> None:
    pages = [np.arange(1, 300, dtype=np.int32)] * len(shapes)
    plan = plan_attention(pages, [b for b, _ in shapes], [n for _, n in shapes])
    rows, width = len(plan.positions), plan.tables.shape[1]
    shape = padding.shape(plan)
    if shape is None:
        assert (
            (max(plan.row_counts) > 16 and not padding.prompts)
            or rows > padding.rows[-1]
            or rows * width * PAGE_SIZE > padding.most_keys / 4
        )
        return
    assert rows <= shape[0] < max(2 * rows, rows + 2)
    assert width <= shape[1] < max(2 * width, padding.least_width + 1)
    assert shape[0] in padding.rows


def test_a_cache_without_memory_is_not_for_padding() -> None:
    target = target_of("llama", True)
    cache = Cache()
    assert target.padded is not None
    cache.step(target, (1, 1, 0, 0))
    assert target.padded.graphs(cache.kv) == 0
    cache.step(target, (1, 1, 0, 0))
    assert target.padded.graphs(cache.kv) == 1


def test_the_graphs_of_a_cache_are_bounded_and_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    target = target_of("llama", True)
    cache, other = Cache(), Cache()
    assert target.padded is not None
    for rows in ((20, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (1, 0, 0, 0), (4, 0, 0, 0)):
        cache.step(target, rows)
    held = target.padded._caches[cache.kv].steps
    assert [shape[0] for shape in held] == [1, 4]  # of the one used least recently, none
    other.step(target, (20, 0, 0, 0))
    other.step(target, (1, 0, 0, 0))
    assert len(target.padded._caches) == 2
    del cache, held
    assert len(target.padded._caches) == 1


@given(paddings, st.integers(1, 1100), st.integers(1, 3000))
def test_the_sizes_told_are_those_that_steps_take(
    padding: Padding, rows: int, context: int
) -> None:
    pages = np.arange(1, 2 + context // PAGE_SIZE, dtype=np.int32)
    shape = padding.shape(plan_attention([pages] * rows, [context - 1] * rows, [1] * rows))
    told = [size for size in padding.sizes(pages_for(context)) if size >= rows]
    assert (None if shape is None else shape[0]) == (told[0] if told else None)
