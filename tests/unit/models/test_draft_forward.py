"""A drafter's ways to run say the same: the family's modules, C++ operators, Triton kernels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import KINDS, LLAMA_LIKE, WINDOW, drafter_of
from helpers.tiny import tiny_drafter, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from dspark.decoding.drawing import COUPLED, GREEDY, INDEPENDENT, DrawRules
from dspark.kernels.attention_plan import PAGE_SIZE, plan_attention
from dspark.kernels.cpu import operators
from dspark.kernels.triton.launch import launches
from dspark.models.draft_forward import (
    DraftForward,
    FusedDraftForward,
    ModuleDraftForward,
    TritonDraftForward,
    draft_forward,
)
from dspark.models.drafter import DSparkDrafter
from dspark.models.graphs import KERNELS
from dspark.models.kv_cache import PagedKVCache

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs AVX2")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
LENGTHS = (0, 5, 40)
SIZE = 4


def bf16_drafter(
    family: str = "llama", draft_vocab: int = 0, rank: int = 16, **shape: Any
) -> DSparkDrafter:
    target = tiny_target(family, vocab=600, **WIDE)
    drafter = tiny_drafter(target, SIZE, draft_vocab=draft_vocab, rank=rank, **WIDE, **shape)
    return drafter.for_inference(torch.bfloat16)


def hidden(
    forward: DraftForward, window: int, dtype: torch.dtype, kv: PagedKVCache | None = None
) -> torch.Tensor:
    """Blocks after contexts of three lengths."""
    generator = torch.Generator().manual_seed(0)
    kv = kv or PagedKVCache(13)
    pages = [np.arange(1 + 4 * s, 5 + 4 * s, dtype=np.int32) for s in range(3)]
    rows = [s for s, length in enumerate(LENGTHS) if length]
    context = plan_attention([pages[s] for s in rows], [0, 0], [LENGTHS[s] for s in rows])
    features = torch.randn(sum(LENGTHS), 64, generator=generator).to(dtype)
    plan = plan_attention(pages, LENGTHS, [SIZE] * 3, block=True, window=window or None)
    tokens = torch.randint(0, 600, (3 * SIZE,), generator=generator)
    with torch.inference_mode():
        forward.write_context(features, context.positions, context.slots, kv)
        return forward.hidden(tokens, plan, kv).float()


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("window", [0, 6 + SIZE])
@pytest.mark.parametrize("sliding", [False, True])
def test_hidden_states(family: str, window: int, sliding: bool) -> None:
    drafter = bf16_drafter(family, **(KINDS[f"{family}, sliding"].drafter if sliding else {}))
    if sliding:
        assert drafter.windows == (WINDOW, None)
    exact = hidden(ModuleDraftForward(copy.deepcopy(drafter).float()), window, torch.float32)
    assert FusedDraftForward.fits(drafter)
    fused = hidden(FusedDraftForward(drafter), window, torch.bfloat16)
    modules = hidden(ModuleDraftForward(drafter), window, torch.bfloat16)
    # as near to fp32 as the family's own modules in bf16
    assert (fused - exact).abs().mean() < 1.2 * (modules - exact).abs().mean()
    assert (exact.roll(1, 0) - exact).abs().mean() > 10 * (fused - exact).abs().mean()


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("window", [0, 6 + SIZE])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_by_the_triton_kernels(
    family: str, window: int, sliding: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 they are those of the modules."""
    drafter = bf16_drafter(family, **(KINDS[f"{family}, sliding"].drafter if sliding else {}))
    drafter = drafter.float()
    monkeypatch.setenv("DSPARK_KERNELS", "reference")
    exact = hidden(ModuleDraftForward(copy.deepcopy(drafter)), window, torch.float32)
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    if not padded:
        single = replace(KERNELS, rows=(1,))
        monkeypatch.setattr("dspark.models.draft_forward.KERNELS", single)
        monkeypatch.setattr("dspark.models.captured_context.KERNELS", single)
    forward = draft_forward(drafter)
    assert isinstance(forward, TritonDraftForward)
    before, kv = launches["rotate_write_kernel"], PagedKVCache(13)
    for _ in range(2):  # what is padded wants a cache that is there
        torch.testing.assert_close(
            hidden(forward, window, torch.float32, kv), exact, atol=1e-4, rtol=1e-4
        )
    assert launches["rotate_write_kernel"] - before == 2 * 2 * len(drafter.layers)
    assert (exact.roll(1, 0) - exact).abs().mean() > 1e-2


@pytest.mark.parametrize("family", [name for name in KINDS if name.startswith("gemma")])
def test_what_does_not_fit_the_operators_runs_as_modules(family: str) -> None:
    drafter = drafter_of(family, rank=16).for_inference(torch.bfloat16)
    assert isinstance(draft_forward(drafter), ModuleDraftForward)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4", "gemma4, mixed"])
def test_families_that_run_as_modules_do_so_in_bf16(family: str) -> None:
    """Over pages of the operators' layout, where their heads are as wide as those want them."""
    kind = KINDS[family]
    shape = WIDE | ({"global_head_dim": 64} if family.startswith("gemma4") else {})
    target = tiny_target(kind.model_type, vocab=600, **(kind.target | shape))
    drafter = tiny_drafter(target, SIZE, **(kind.drafter | shape)).for_inference(torch.bfloat16)
    exact = hidden(ModuleDraftForward(copy.deepcopy(drafter).float()), 0, torch.float32)
    modules = hidden(ModuleDraftForward(drafter), 0, torch.bfloat16)
    assert (exact.roll(1, 0) - exact).abs().mean() > 10 * (modules - exact).abs().mean()


def test_capped_logits_are_not_left_to_the_operators() -> None:
    drafter = bf16_drafter(final_logit_softcapping=2.0)
    assert isinstance(draft_forward(drafter), ModuleDraftForward)


@given(
    st.lists(st.sampled_from([GREEDY, INDEPENDENT, COUPLED]), min_size=1, max_size=9),
    st.sampled_from([0, 70, 300]),
    st.sampled_from([0, 3]),
    st.sampled_from([1.0, 0.8]),
    st.integers(0, 2**31),
)
def test_draws(kinds: list[int], draft_vocab: int, top_k: int, top_p: float, seed: int) -> None:
    """Same tokens and laws, but where rounding decides: the Markov bias is bf16 in the modules."""
    drafter = DRAFTERS[draft_vocab]
    generator = torch.Generator().manual_seed(seed)
    sessions = len(kinds)
    states = torch.randn(sessions, SIZE, 64, generator=generator).bfloat16()
    anchors = torch.randint(0, 600, (sessions,), generator=generator)
    rules = DrawRules(
        kinds=torch.tensor(kinds),
        temperature=torch.rand(sessions, generator=generator) + 0.5,
        top_k=torch.full((sessions,), top_k),
        top_p=torch.full((sessions,), top_p),
        keys=torch.randint(-(2**62), 2**62, (sessions, SIZE), generator=generator),
    )
    with torch.inference_mode():
        fast = FusedDraftForward(drafter).draw(states.clone(), anchors, rules, 16)
        slow = ModuleDraftForward(copy.deepcopy(drafter).float()).draw(
            states.float(), anchors, rules, 16
        )
    for s, kind in enumerate(kinds):
        for k in range(SIZE):
            torch.testing.assert_close(
                fast.confidence_logits[s, k], slow.confidence_logits[s, k], atol=1e-3, rtol=1e-3
            )
            if kind == INDEPENDENT:
                law = dict(
                    zip(
                        *(t[s, k].tolist() for t in (fast.candidate_ids, fast.candidate_probs)),
                        strict=True,
                    )
                )
                want = dict(
                    zip(
                        *(t[s, k].tolist() for t in (slow.candidate_ids, slow.candidate_probs)),
                        strict=True,
                    )
                )
                assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
                assert int(fast.tokens[s, k]) in law
                if top_p == 1.0:  # else an edge may fall between two roundings
                    assert law == pytest.approx(want, abs=2e-3)
            else:
                assert not fast.candidate_probs[s, k].any()
            if fast.tokens[s, k] != slow.tokens[s, k]:
                DIFFERED.append((kind, top_p))
                break  # what follows is conditioned on another token
        TOLD.append(kind)
    assert len(DIFFERED) <= 2 + 0.05 * len(TOLD)


DRAFTERS = {vocab: bf16_drafter(draft_vocab=vocab) for vocab in (0, 70, 300)}
DIFFERED: list[tuple[int, float]] = []
TOLD: list[int] = []


def test_pages_of_a_drafter_hold_no_more_than_it_wrote() -> None:
    drafter = bf16_drafter()
    kv = PagedKVCache(3)
    plan = plan_attention([np.array([2], dtype=np.int32)], [3], [5])
    with torch.inference_mode():
        FusedDraftForward(drafter).write_context(
            torch.randn(5, 64).bfloat16(), plan.positions, plan.slots, kv
        )
    keys, _ = kv.pages(0, 2, 32)
    by_slot = keys.view(3, 2, 16, PAGE_SIZE, 2)
    written = by_slot.abs().sum(dim=(1, 2, 4)) > 0  # [pages, slots]
    assert written.nonzero().tolist() == [[2, slot] for slot in range(3, 8)]
