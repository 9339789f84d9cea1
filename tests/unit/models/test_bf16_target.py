"""The bf16 target on the CPU: as accurate as transformers, and the same however a text is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import TAPS, hf_model, run, tiny_drafter, tiny_engine

from dspark.kernels.attention_plan import plan_attention
from dspark.kernels.cpu import operators
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs AVX2 and a C++ compiler")

WIDE = {"head_dim": 32}
SLIDING = {**WIDE, "sliding_window": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": {**WIDE, "hidden_size": 128, "intermediate_size": 96},
    "qwen3": WIDE,
    "mistral": SLIDING,
    "gemma2": {**SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32},
    "gpt_oss": {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
}
FUSED = ("llama", "qwen2", "qwen3", "mistral")
LENGTH = 60
CUTS = ([60], [37, 1, 1, 6, 15], [1] * 60)


def bf16_model(family: str) -> Any:
    return hf_model(family, vocab=64, **FAMILIES[family]).bfloat16()


def outputs(target: TargetModel, cuts: list[int], neighbours: int) -> tuple[torch.Tensor, ...]:
    """Logits and taps of a text run in pieces, with as many other texts in every step."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 64, (1 + neighbours, LENGTH), generator=generator)
    pages = [np.arange(1 + 4 * s, 5 + 4 * s, dtype=np.int32) for s in range(1 + neighbours)]
    kv = PagedKVCache(4 * (1 + neighbours) + 1)
    logits, taps, done = [], [], 0
    for rows in cuts:
        span = slice(done, done + rows)
        done += rows
        order = [*range(1, 1 + neighbours), 0]  # the text itself comes last
        out = target.forward(
            TargetBatch(
                token_ids=torch.cat([texts[s][span] for s in order]),
                attention=plan_attention(
                    [pages[s] for s in order], [span.start] * len(order), [rows] * len(order)
                ),
                logit_rows=torch.arange(rows * neighbours, rows * (1 + neighbours)),
            ),
            kv,
        )
        assert out.taps is not None
        logits.append(out.logits)
        taps.append(out.taps[-rows:])
    return torch.cat(logits), torch.cat(taps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [True, False])
def test_as_accurate_as_transformers_in_bf16(family: str, fused: bool) -> None:
    target = TargetModel(bf16_model(family), TAPS, fused=fused)
    assert target.fused == (fused and family in FUSED)
    got, taps = outputs(target, [LENGTH], 0)
    ids = torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = bf16_model(family).float()(ids, output_hidden_states=True)
        theirs = bf16_model(family)(ids, output_hidden_states=True)
    wanted = torch.cat([exact.hidden_states[i + 1][0] for i in TAPS], dim=-1)
    their_taps = torch.cat([theirs.hidden_states[i + 1][0] for i in TAPS], dim=-1).float()
    assert deviation(got, exact.logits[0]) < 1.2 * deviation(theirs.logits[0], exact.logits[0])
    assert deviation(taps, wanted) < 1.2 * deviation(their_taps, wanted)


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).abs().mean())


@pytest.mark.parametrize("family", FUSED)
def test_the_same_bits_however_a_text_is_cut_and_whoever_is_beside_it(family: str) -> None:
    target = TargetModel(bf16_model(family), TAPS)
    whole = outputs(target, CUTS[0], 0)
    for cuts in CUTS:
        for neighbours in (0, 3):
            for got, want in zip(outputs(target, cuts, neighbours), whole, strict=True):
                assert torch.equal(got, want), (cuts, neighbours)


def test_greedy_with_drafts_is_greedy_without_in_bf16_too() -> None:
    """Not only up to near-ties: verified in a block of any length, a row has the same logits."""
    requests = [
        Request(str(i), tuple(range(1, 5 + i)), SamplingParams(temperature=0.0, max_tokens=60))
        for i in range(6)
    ]
    target = TargetModel(bf16_model("llama"), TAPS)
    plain = run(tiny_engine(target), requests)
    drafter = tiny_drafter(target).for_inference(torch.bfloat16)
    drafted = run(tiny_engine(target, drafter), requests, budget_seed=3)
    assert drafted.drafted > 0
    assert drafted.accepted > 0
    assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("family", FUSED)
def test_whole_sequences_are_those_of_one_step(family: str) -> None:
    target = TargetModel(bf16_model(family), TAPS)
    texts = [torch.arange(n) % 64 for n in (LENGTH, 7)]
    both = target.forward_whole(texts, torch.arange(LENGTH + 7))
    alone = [target.forward_whole([text], torch.arange(len(text))) for text in texts]
    assert target.fused
    torch.testing.assert_close(both.logits, torch.cat([one.logits for one in alone]))
    torch.testing.assert_close(both.taps, torch.cat([one.taps for one in alone]))
