"""Output is the target's own, whatever is drafted, verified or batched together."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from helpers.tiny import ScriptedLink, Tally, hf_model, run, tiny_drafter, tiny_engine, tiny_target
from scipy import stats

from dspark.decoding.law import target_law
from dspark.engine.judge import Judged, judge
from dspark.types import BlockProposal, Fence, Request, SamplingParams, VerifyMode

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
FALSE_ALARM = 1e-4  # of each statistical test; seeds are fixed, so a pass stays a pass


def conclusive(tally: Tally) -> Tally:
    assert tally.drafted > 0, "INCONCLUSIVE: nothing was drafted"
    assert tally.verified > 0, "INCONCLUSIVE: nothing was verified"
    assert tally.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    return tally


def reference_continuations(family: str, requests: list[Request]) -> dict[str, list[int]]:
    """Prompt and greedy continuation, by transformers alone."""
    model = hf_model(family)
    out = {}
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.sampling.max_tokens,
        )
        out[request.id] = made[0].tolist()
    return out


def greedy_requests(max_tokens: int = 40) -> list[Request]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [Request(str(n), PROMPT[:n], sampling) for n in (1, 2, 5, 8)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_equals_transformers_generate(family: str) -> None:
    requests = greedy_requests()
    want = reference_continuations(family, requests)
    target = tiny_target(family)
    link = ScriptedLink(want, target.vocab_size)
    engine = tiny_engine(target, tiny_drafter(target), link=link)
    tally = conclusive(run(engine, requests, budget_seed=0))
    for request in requests:
        assert tally.tokens[request.id] == want[request.id][len(request.prompt_token_ids) :]


@pytest.mark.parametrize("window", [0, 5])
def test_greedy_equals_plain_with_a_real_drafter(window: int) -> None:
    requests = greedy_requests(100)
    target = tiny_target()
    plain = run(tiny_engine(target), requests)
    tally = run(tiny_engine(target, tiny_drafter(target, window=window)), requests)
    conclusive(tally)
    assert tally.tokens == plain.tokens


def exact_law(prompt: tuple[int, ...], sampling: SamplingParams, depth: int) -> torch.Tensor:
    """P of every continuation of `depth` tokens, by transformers alone: [V] * depth."""
    model = hf_model(vocab=VOCAB)
    law = torch.ones(())
    for d in range(depth):
        prefixes = list(product(range(VOCAB), repeat=d))
        batch = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.inference_mode():
            logits = model(batch).logits[:, -1]
        n = len(prefixes)
        step = target_law(
            logits,
            torch.full((n,), sampling.temperature),
            torch.full((n,), sampling.top_k),
            torch.full((n,), sampling.top_p),
        )
        law = law[..., None] * step.view(*[VOCAB] * (d + 1)).double()
    return law


VOCAB = 8
SAMPLES = 6000


@pytest.mark.statistical
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (1.0, 0.9), (0.7, 0.9)])
def test_rejection_follows_the_target_law_under_changing_budgets(
    temperature: float, top_p: float
) -> None:
    p_value, tally = goodness_of_fit(temperature, top_p)
    conclusive(tally)
    assert p_value > FALSE_ALARM


@pytest.mark.statistical
def test_a_biased_verifier_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test fails when accept draws come out too small, as a shared stream makes them."""
    import dspark.engine.judge as judge

    honest = judge.uniform
    monkeypatch.setattr(judge, "uniform", lambda keys: honest(keys) ** 2)
    p_value, _ = goodness_of_fit(1.0, 1.0)
    assert p_value < FALSE_ALARM


def goodness_of_fit(temperature: float, top_p: float) -> tuple[float, Tally]:
    """χ² of the first three tokens of many requests against the exact law."""
    target = tiny_target(vocab=VOCAB)
    engine = tiny_engine(target, tiny_drafter(target), max_requests=64, max_waiting=SAMPLES)
    sampling = [
        SamplingParams(temperature=temperature, top_p=top_p, max_tokens=6, seed=i)
        for i in range(SAMPLES)
    ]
    requests = [Request(str(i), PROMPT[:3], s) for i, s in enumerate(sampling)]
    tally = run(engine, requests, budget_seed=1)
    law = exact_law(PROMPT[:3], sampling[0], depth=3).flatten()
    seen = torch.zeros(VOCAB**3, dtype=torch.float64)
    for tokens in tally.tokens.values():
        a, b, c = tokens[:3]
        seen[(a * VOCAB + b) * VOCAB + c] += 1
    assert seen[law == 0].sum() == 0, "a token outside top-p was emitted"
    # χ² wants five expected in a cell: pool what is rarer
    expected = law * SAMPLES
    common = expected >= 5
    observed = torch.cat([seen[common], seen[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    kept = wanted > 0
    result = stats.chisquare(observed[kept].numpy(), wanted[kept].numpy(), sum_check=False)
    return float(result.pvalue), tally


def coupled(seed: int, **settings: float) -> SamplingParams:
    return SamplingParams(
        temperature=0.9, max_tokens=24, seed=seed, mode=VerifyMode.COUPLED, **settings
    )


def test_coupled_output_is_a_function_of_prompt_seed_and_target() -> None:
    target = tiny_target()
    sampling = [coupled(0), coupled(1, top_p=0.8), coupled(2), coupled(3)]
    requests = [Request(str(i), PROMPT[: i + 2], s) for i, s in enumerate(sampling)]
    plain = run(tiny_engine(target), requests).tokens
    drafted = conclusive(run(tiny_engine(target, tiny_drafter(target)), requests))
    budgets = conclusive(
        run(tiny_engine(target, tiny_drafter(target, seed=5)), requests, budget_seed=3)
    )
    alone = {
        r.id: run(tiny_engine(target, tiny_drafter(target)), [r]).tokens[r.id] for r in requests
    }
    assert plain == drafted.tokens == budgets.tokens == alone


def test_a_failover_goes_on_with_the_same_coupled_output() -> None:
    target = tiny_target()
    request = Request("a", PROMPT, coupled(7))
    whole = run(tiny_engine(target), [request]).tokens["a"]
    rest = SamplingParams(temperature=0.9, max_tokens=14, seed=7, mode=VerifyMode.COUPLED)
    resumed = Request("a", (*PROMPT, *whole[:10]), rest, epoch=1)
    again = conclusive(run(tiny_engine(target, tiny_drafter(target)), [resumed]))
    assert again.tokens["a"] == whole[10:]


def test_laws_of_different_widths_are_judged_together() -> None:
    law = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    requests = [Request(name, (1,), SamplingParams(seed=i)) for i, name in enumerate("ab")]
    blocks = [
        BlockProposal(
            Fence(name, 0, 0, 1),
            np.array([0]),
            np.array([0.5], dtype=np.float32),
            np.arange(width)[None],
            np.full((1, width), 1 / width, dtype=np.float32),
        )
        for name, width in (("a", 2), ("b", 4))
    ]
    judged = [Judged(r, b.fence, b, 1) for r, b in zip(requests, blocks, strict=True)]
    verdicts = judge(law.log().expand(4, 4), judged)
    # token 0 is likelier under the target than under either law: it always stands
    assert [v.accepted for v in verdicts] == [1, 1]
