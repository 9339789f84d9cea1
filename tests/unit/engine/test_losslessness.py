"""Output is the target's own, whatever is drafted, verified or batched together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers.laws import next_law
from helpers.tables import flat_table
from helpers.tiny import (
    ScriptedLink,
    Tally,
    autoregressive_link,
    hf_model,
    random_plan,
    run,
    tiny_causal_drafter,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)
from scipy import stats

from dspark.config import ServiceClass
from dspark.decoding import drawing
from dspark.decoding.noise import Stream, draw_key
from dspark.engine import drafting, judge, verification
from dspark.engine.lookup import PromptLookup
from dspark.engine.sequence import Sequence
from dspark.engine.verifier import VerifierEngine
from dspark.kernels.cpu import operators
from dspark.scheduling.planner import Search
from dspark.scheduling.round_times import RoundTimes
from dspark.types import (
    BlockProposal,
    DraftWork,
    Fence,
    Request,
    SamplingParams,
    VerifyMode,
)

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


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"window": 5},
        {"head": "gated"},
        {"head": "rnn", "from_anchor": False},
        {"rank": 0, "confidence": False, "from_anchor": False},
    ],
    ids=str,
)
def test_greedy_equals_plain_with_a_real_drafter(kind: dict[str, Any]) -> None:
    requests = greedy_requests(100)
    target = tiny_target()
    plain = run(tiny_engine(target), requests)
    tally = run(tiny_engine(target, tiny_drafter(target, **kind)), requests)
    conclusive(tally)
    assert tally.tokens == plain.tokens


def exact_law(sampling: SamplingParams, depth: int, prompt: tuple[int, ...]) -> torch.Tensor:
    """P of every continuation of `depth` tokens, by transformers alone: [V] * depth."""
    model = hf_model(vocab=VOCAB)
    law = torch.ones((), dtype=torch.float64)
    for d in range(depth):
        prefixes = list(product(range(VOCAB), repeat=d))
        batch = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        step = next_law(model, batch, sampling)[:, -1]
        law = law[..., None] * step.view(*[VOCAB] * (d + 1))
    return law


VOCAB = 8
DEPTH = 3  # tokens whose joint law is compared


def goodness_of_fit(
    engine: VerifierEngine,
    sampling: SamplingParams,
    samples: int,
    *,
    budgets: bool = True,
    recalibrated: bool = False,
    after: int = 0,
    prompt: tuple[int, ...] = PROMPT[:3],
) -> float:
    """χ² p-value of tokens `after` to DEPTH of many requests, jointly, against the exact law."""
    requests = [Request(str(i), prompt, replace(sampling, seed=i)) for i in range(samples)]
    tally = conclusive(
        run(engine, requests, budget_seed=1 if budgets else None, recalibrated=recalibrated)
    )
    return fit_of(tally, sampling, samples, prompt, after)


def fit_of(
    tally: Tally, sampling: SamplingParams, samples: int, prompt: tuple[int, ...], after: int = 0
) -> float:
    """The same of what came of them."""
    law = exact_law(sampling, DEPTH, prompt)
    seen = torch.zeros(*[VOCAB] * DEPTH, dtype=torch.float64)
    for tokens in tally.tokens.values():
        seen[tuple(tokens[:DEPTH])] += 1
    for _ in range(after):
        law, seen = law.sum(0), seen.sum(0)
    law, seen = law.flatten(), seen.flatten()
    assert seen[law == 0].sum() == 0, "a token outside top-p was emitted"
    # χ² wants five expected in a cell: pool what is rarer
    expected = law * samples
    common = expected >= 5
    observed = torch.cat([seen[common], seen[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    kept = wanted > 0
    result = stats.chisquare(observed[kept].numpy(), wanted[kept].numpy(), sum_check=False)
    return float(result.pvalue)


def sampling_engine(monkeypatch: pytest.MonkeyPatch) -> VerifierEngine:
    """Drafts from a law cut to five of eight tokens, so that the cut is put to the test too.

    The gate, which would go by this machine's times, lets all blocks through: a bias must show.
    """
    monkeypatch.setattr(drafting, "CANDIDATES", 5)
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)
    target = tiny_target(vocab=VOCAB)
    return tiny_engine(target, tiny_drafter(target), max_requests=64, max_waiting=10_000)


@pytest.mark.statistical
@pytest.mark.parametrize("operator", [True, False])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (1.0, 0.9), (0.7, 0.9)])
def test_rejection_follows_the_target_law_under_changing_budgets(
    temperature: float, top_p: float, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not operator:
        monkeypatch.setattr(judge, "_has_operator", lambda _: False)
    elif not operators.available():
        pytest.skip("needs AVX2 and a C++ compiler")
    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=6)
    engine = sampling_engine(monkeypatch)
    assert goodness_of_fit(engine, sampling, samples=6000, recalibrated=True) > FALSE_ALARM


@pytest.mark.statistical
@pytest.mark.parametrize("planner", ["synchronous", "asynchronous"])
def test_rejection_follows_the_target_law_with_everything_on(
    planner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes, floors, a policy by request, plans that change, lapse and come twice."""
    monkeypatch.setattr(drafting, "CANDIDATES", 5)
    target = tiny_target(vocab=VOCAB)
    classes = {
        "floor": ServiceClass(weight=3.0, min_tokens_per_s=1500.0),
        "light": ServiceClass(weight=0.2),
        "default": ServiceClass(max_first_token_s=1e-3),
    }
    engine = tiny_engine(
        target,
        tiny_drafter(target),
        policy="adaptive",
        planner=planner,
        draft_by_request=True,
        max_requests=16,
        max_waiting=10_000,
        classes=classes,
    )
    # rows that cost something, so that there is something to weigh and to cut
    engine.table = flat_table((1, 16), (1, 5), ((1.0, 1.6), (2.0, 9.0)))
    sampling = SamplingParams(temperature=0.8, max_tokens=6)
    names = ["", "floor", "light"]
    samples = 4000
    requests = [
        Request(str(i), PROMPT[:3], replace(sampling, seed=i), service_class=names[i % 3])
        for i in range(samples)
    ]
    for request in requests:
        engine.add(request)
    tally, plans = Tally(), random.Random(0)
    plan = random_plan(plans)
    while engine.has_work:
        if plans.random() < 0.3:
            plan = replace(random_plan(plans), valid_for_s=plans.choice([0.0, 1e-3, 10.0]))
        if plans.random() < 0.5:
            engine.set_plan(plan)  # often the same again
        tally.add(engine.step())
    conclusive(tally)
    assert fit_of(tally, sampling, samples, PROMPT[:3]) > FALSE_ALARM


def small_accept_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_has_operator", lambda _: False)
    honest = judge.uniform
    monkeypatch.setattr(judge, "uniform", lambda keys: honest(keys) ** 2)


def recovery_from_the_accept_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(seed: int, stream: Stream, *counters: int) -> int:
        if stream is Stream.RECOVER:
            return draw_key(seed, Stream.ACCEPT, *counters, 0)
        return draw_key(seed, stream, *counters)

    monkeypatch.setattr(judge, "draw_key", shared)


def a_law_that_was_not_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposal is drawn at one temperature and described at another."""
    honest = drawing.sample
    monkeypatch.setattr(drawing, "sample", lambda law, draws: honest(law**3, draws))


@pytest.mark.statistical
@pytest.mark.parametrize(
    "bias", [small_accept_draws, recovery_from_the_accept_stream, a_law_that_was_not_drawn_from]
)
def test_a_biased_engine_is_found_out(
    bias: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above has the power to fail: a few thousand samples tell."""
    bias(monkeypatch)
    sampling = SamplingParams(max_tokens=6)
    assert goodness_of_fit(sampling_engine(monkeypatch), sampling, samples=9000) < FALSE_ALARM


class Unsure(PromptLookup):
    """Calls its tokens unlikely, where nothing else was possible."""

    def propose(self, sequence: Sequence, size: int) -> BlockProposal | None:
        block = super().propose(sequence, size)
        if block is None or block.candidate_probs is None:
            return block
        return replace(block, candidate_probs=0.2 * block.candidate_probs)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("lookup", "top_p", "operator", "lossless"),
    [
        (PromptLookup, 1.0, True, True),
        (PromptLookup, 0.8, False, True),
        (Unsure, 1.0, True, False),
    ],
)
def test_rejection_follows_the_target_law_with_prompt_lookup(
    lookup: type[PromptLookup],
    top_p: float,
    operator: bool,
    lossless: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not operator:
        monkeypatch.setattr(judge, "_has_operator", lambda _: False)
    elif not operators.available():
        pytest.skip("needs AVX2 and a C++ compiler")
    engine = tiny_engine(
        tiny_target(vocab=VOCAB), lookup=lookup(), max_requests=64, max_waiting=10_000
    )
    # Whatever two tokens come, they have occurred before: blocks come at once.
    prompt = tuple(token for pair in product(range(VOCAB), repeat=2) for token in pair)
    sampling = SamplingParams(top_p=top_p, max_tokens=6)
    p_value = goodness_of_fit(engine, sampling, samples=3000, prompt=prompt)
    assert (p_value > FALSE_ALARM) is lossless


@pytest.mark.statistical
def test_rejection_follows_the_target_law_with_an_autoregressive_drafter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafting, "CANDIDATES", 5)
    engine = tiny_engine(
        tiny_target(vocab=VOCAB),
        link=autoregressive_link(tiny_causal_drafter(vocab=VOCAB), num_pages=256),
        max_requests=64,
        max_waiting=10_000,
    )
    sampling = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=6)
    assert goodness_of_fit(engine, sampling, samples=3000) > FALSE_ALARM


class TellingLink(ScriptedLink):
    """Drafts evenly; its third confidence gives away which second token was drawn."""

    def __init__(self) -> None:
        super().__init__({}, VOCAB)

    def submit(self, works: Iterable[DraftWork]) -> None:
        for work in works:
            size = work.block_size
            tokens = self._rng.integers(0, VOCAB, size)
            last = 1.0 if size > 1 and tokens[1] < VOCAB // 2 else 0.0
            self._ready.append(
                BlockProposal(
                    work.fence,
                    tokens,
                    np.array([0.9, 0.8, last], dtype=np.float32)[:size],
                    np.tile(np.arange(VOCAB), (size, 1)),
                    np.full((size, VOCAB), 1 / VOCAB, dtype=np.float32),
                )
            )


# One row more costs little, two cost much, and a third next to nothing: Algorithm 1 stops before
# the second drafted token, a global search goes on where the third one looks good.
JAGGED = flat_table((1, 2), (1, 2, 3, 4), ((1.0, 1.2, 2.0, 2.05),) * 2)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("planner", "search", "lossless"),
    [
        ("synchronous", "causal", True),
        ("asynchronous", "causal", True),
        ("synchronous", "global", False),
    ],
)
def test_confidences_that_tell_of_tokens_do_no_harm(
    planner: str, search: Search, lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appendix A through the whole engine."""
    monkeypatch.setattr(verification, "freest_search", lambda _: search)
    target = tiny_target(vocab=VOCAB)
    engine = tiny_engine(
        target,
        tiny_drafter(target, block_size=3),
        link=TellingLink(),
        policy="adaptive",
        planner=planner,
        max_requests=1,
        max_waiting=10_000,
    )
    # the machine's own times would close the gate, and leave nothing to be biased
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)
    if planner == "asynchronous":  # it goes by times that are known
        monkeypatch.setattr(RoundTimes, "drafting_known", True)
    engine.table = JAGGED
    # a nearly even law, so that what is drafted mostly stands and its bias with it
    sampling = SamplingParams(temperature=3.0, max_tokens=5)
    p_value = goodness_of_fit(engine, sampling, samples=600, budgets=False, after=2)
    assert (p_value > FALSE_ALARM) is lossless


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


def test_whatever_shares_a_batch_changes_nothing() -> None:
    """Greedy, coupled, rejection and undrafted requests side by side, against each alone."""
    target = tiny_target()
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=30),
        coupled(4, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=9, max_tokens=30, seed=5),
        SamplingParams(temperature=0.8, max_tokens=30, seed=6, speculate=False),
    ]
    requests = [Request(str(i), PROMPT[: i + 3], kind) for i, kind in enumerate(kinds)]
    together = conclusive(run(tiny_engine(target, tiny_drafter(target)), requests))
    for one in requests:
        alone = run(tiny_engine(target, tiny_drafter(target)), [one])
        assert together.tokens[one.id] == alone.tokens[one.id]


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
    judged = [judge.Judged(r, b.fence, b, 1) for r, b in zip(requests, blocks, strict=True)]
    verdicts = judge.judge(law.log().expand(4, 4), judged)
    # token 0 is likelier under the target than under either law: it always stands
    assert [v.accepted for v in verdicts] == [1, 1]
