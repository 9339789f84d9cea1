"""The two ways to judge a step, torch and C++, come to the same verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.engine import judge as judging
from dspark.engine.judge import Judged, judge
from dspark.kernels.cpu import operators
from dspark.types import BlockProposal, Fence, Request, SamplingParams, VerifyMode

RULES = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_k": 20},
    {"top_k": 500, "top_p": 0.3},
    {"mode": VerifyMode.COUPLED},
    {"mode": VerifyMode.COUPLED, "top_p": 0.8},
    {"mode": VerifyMode.COUPLED, "top_k": 7, "temperature": 0.5},
)
seeds = st.integers(0, 2**31)


def proposed(
    name: str, logits: torch.Tensor, sampling: SamplingParams, generator: torch.Generator
) -> Judged:
    """A block drawn from a law on the target's likeliest tokens, so that many stand."""
    fence, length = Fence(name, 0, 3, 30), len(logits) - 1
    request = Request(name, (0,) * 30, sampling)
    if not length:
        return Judged(request, fence, None, 0)
    ids = logits[:-1].topk(min(16, logits.shape[1])).indices
    probs = torch.softmax(torch.randn(ids.shape, generator=generator), -1)
    drawn = ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
    tokens = ids[:, 0] if sampling.greedy else drawn
    confidences = np.ones(length, dtype=np.float32)
    proposal = BlockProposal(fence, tokens.numpy(), confidences, ids.numpy(), probs.numpy())
    return Judged(request, fence, proposal, length)


@pytest.mark.skipif(not operators.available(), reason="needs AVX2 and a C++ compiler")
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(RULES)), min_size=1, max_size=6),
    st.sampled_from([3, 40, 600, 5000]),
    st.floats(0.1, 8.0),
    seeds,
)
def test_the_operator_comes_to_the_verdicts_of_the_reference(
    requests: list[tuple[int, dict[str, object]]], vocabulary: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(length + 1, vocabulary, generator=generator) * spread for length, _ in requests
    ]
    judged = [
        proposed(str(i), part, SamplingParams(seed=seed + i, **rules), generator)  # type: ignore[arg-type]
        for i, (part, (_, rules)) in enumerate(zip(parts, requests, strict=True))
    ]
    logits = torch.cat(parts)
    fast = judge(logits, judged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "_has_operator", lambda _: False)
        assert fast == judge(logits, judged)


@pytest.mark.skipif(not operators.available(), reason="needs AVX2 and a C++ compiler")
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("rules", [{}, {"mode": VerifyMode.COUPLED}])
def test_equal_logits_are_cut_at_the_first_tokens(top_p: float, rules: dict[str, object]) -> None:
    """The nucleus of a flat row: as many of the first tokens as it takes."""
    logits = torch.zeros(1, 2000)
    kept = -(-round(top_p * 2000, 6) // 1)
    for seed in range(200):
        sampling = SamplingParams(top_p=top_p, seed=seed, **rules)  # type: ignore[arg-type]
        one = Judged(Request("s", (0,), sampling), Fence("s", 0, seed, 1), None, 0)
        (verdict,) = judge(logits, [one])
        assert verdict.next_token_id < kept + 1


def test_what_lies_outside_the_vocabulary_is_refused() -> None:
    if not operators.available():
        pytest.skip("the reference raises in torch's own way")
    logits = torch.zeros(2, 10)
    fence = Fence("s", 0, 0, 1)
    proposal = BlockProposal(fence, np.array([10]), np.ones(1, dtype=np.float32))
    greedy = Request("s", (0,), SamplingParams(temperature=0.0))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9"):
        judge(logits, [Judged(greedy, fence, proposal, 1)])
