"""Triton's draft head against the rules in fp64, under the interpreter or on a GPU.

The reference is told what was drafted before, so that one draw on an edge does not spoil the rest.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_drafter, tiny_target
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark.decoding.drawing import COUPLED, GREEDY, INDEPENDENT, DrawnBlocks, DrawRules
from dspark.decoding.noise import gumbel as reference_gumbel
from dspark.decoding.noise import uniform
from dspark.models.captured_draw import CapturedDraw
from dspark.models.draft_forward import ModuleDraftForward
from dspark.models.sequential_head import MarkovHead, sequential_head

pytest.importorskip("triton")
import triton
import triton.language as tl

from dspark.kernels.triton.draft_head import MOST_CANDIDATES, DraftHead, draw_blocks
from dspark.kernels.triton.launch import INTERPRETED, launch, launches
from dspark.kernels.triton.noise import gumbel, unit, word

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (GREEDY, INDEPENDENT, COUPLED)

vocabularies = st.sampled_from([1, 7, 63, 64, 65, 200, 1000])
counts = st.sampled_from([1, 3, 5, 16, 17, 64])
kinds_of_logits = st.sampled_from(["plain", "wide", "tied", "masked"])


def rules_of(sessions: int, size: int, generator: torch.Generator) -> DrawRules:
    """All kinds in turn, cuts and temperatures of all sorts."""
    some = torch.rand(4, sessions, generator=generator)
    return DrawRules(
        kinds=torch.arange(sessions) % 3,
        temperature=some[0] * 1.5 + 0.2,
        top_k=(some[1] * 40).long() * (some[2] < 0.5),
        top_p=torch.where(some[2] > 0.3, some[3].clamp(min=0.05), 1.0),
        keys=torch.randint(-(2**63), 2**63 - 1, (sessions, size), generator=generator),
    )


def logits_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """±3, ±30, a few values that many tokens share (both zeros), or with tokens masked."""
    logits = torch.randn(shape, generator=generator) * 3
    if kind == "wide":
        logits = logits.sign() * 30 + (logits.abs() < 0.5) * logits
    if kind == "tied":
        logits = torch.tensor([-2.0, -0.0, 0.0, 1.0])[
            torch.randint(0, 4, shape, generator=generator)
        ]
    if kind == "masked":
        masked = torch.rand(shape, generator=generator) < 0.8
        masked[..., shape[-1] // 2] = False
        logits = logits.masked_fill(masked, float("-inf"))
    return logits


def law_of(
    logits: np.ndarray,  # [V_d] fp64
    k: int,
    rules: DrawRules,
    s: int,
) -> tuple[np.ndarray, np.ndarray]:  # [K] draft ids, [K] fp64
    """dspark.decoding.law.proposal_law, of equals the first token first."""
    ids = np.lexsort((np.arange(len(logits)), -logits))[:k]
    rank, top_k = np.arange(len(ids)), int(rules.top_k[s])
    weights = np.exp((logits[ids] - logits[ids[0]]) / float(rules.temperature[s]))
    if top_k:
        weights[rank >= top_k] = 0.0
    share = weights / weights.sum()
    before = np.cumsum(share) - share
    weights[(before >= float(rules.top_p[s])) & (rank > 0)] = 0.0
    return ids, weights / weights.sum()


def check_draw(
    token: int,
    ids: np.ndarray,  # [K] target ids
    law: np.ndarray,  # [K]
    rules: DrawRules,
    s: int,
    k: int,
    tolerance: float,  # of probabilities
) -> None:
    """The token is what the session's rule makes of the law and the key."""
    kind, key = int(rules.kinds[s]), rules.keys[s, k : k + 1]
    (chosen,) = np.flatnonzero(ids == token)
    if kind == GREEDY:
        assert chosen == 0
    elif kind == INDEPENDENT:
        end, draw = np.cumsum(law)[chosen], float(uniform(key))
        assert law[chosen] > 0.0
        assert end - law[chosen] - tolerance <= draw <= end + tolerance
    else:
        with np.errstate(divide="ignore"):
            noisy = np.log(law) + reference_gumbel(key, torch.from_numpy(ids))[0].numpy()
        assert noisy[chosen] >= noisy.max() - tolerance


def on(device: str, head: DraftHead) -> DraftHead:
    moved = {
        name: value.to(device)
        for name in ("vocabulary", "w1", "w2", "confidence", "confidence_bias")
        if (value := getattr(head, name)) is not None
    }
    return replace(head, **moved)


def run(
    base: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    head: DraftHead,
    rules: DrawRules,
    candidates: int,
    **options: Any,
) -> DrawnBlocks:
    moved = DrawRules(*(t.to(DEVICE) for t in rules.tensors))
    drawn = draw_blocks(
        base.to(DEVICE), hidden.to(DEVICE), anchors.to(DEVICE), on(DEVICE, head), moved,
        candidates, **options,
    )  # fmt: skip
    return DrawnBlocks(*(t.cpu() for t in drawn.tensors))


@triton.jit
def _noise_kernel(words, units, noise, keys, tokens, count: tl.constexpr):
    i = tl.arange(0, count)
    key, token = tl.load(keys + i), tl.load(tokens + i)
    made = word(key, token)
    tl.store(words + i, made.to(tl.int64))
    tl.store(units + i, unit(made))
    tl.store(noise + i, gumbel(key, token))


def test_noise_is_that_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    keys[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    tokens = torch.randint(0, 262_144, (256,), generator=generator)
    tokens[::2] = 0
    keys, tokens = keys.to(DEVICE), tokens.to(DEVICE)
    words, units, noise = torch.empty_like(keys), keys.double(), keys.double()
    launch(_noise_kernel, (1,), words, units, noise, keys, tokens, count=256)
    # The reference shows its words as units, of 52 bits: those are to the bit.
    assert torch.equal(units[::2], uniform(keys[::2]))
    shifted = keys + tokens * (0x9E3779B97F4A7C15 - 2**64)
    assert torch.equal(units, uniform(shifted))
    low = (words & 0xFFF).cpu().numpy()
    assert low.tolist() == [_word(int(key)) & 0xFFF for key in shifted], "and the last 12 bits"
    want = torch.diagonal(reference_gumbel(keys, tokens))
    # log may be another; where the noise is near 0 its inner log's rounding is magnified
    torch.testing.assert_close(noise, want, rtol=1e-12, atol=1e-13)


def _word(key: int) -> int:
    x = key % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(max_examples=40)
@given(
    vocabularies, counts, st.sampled_from([1, 3, 5]), kinds_of_logits, st.sampled_from(TYPES),
    st.integers(0, 2**31),
)  # fmt: skip
@example(7, 64, 3, "tied", torch.float32, 0)  # K > V_d
@example(4097, 64, 17, "tied", torch.bfloat16, 1)
@example(4097, 16, 3, "masked", torch.float16, 2)
@example(1000, 64, 3, "masked", torch.float32, 3)
def test_laws_and_draws_of_given_logits(
    vocabulary: int, candidates: int, sessions: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    """Without a bias, logits are what they were: candidates are to be the same, in order."""
    generator = torch.Generator().manual_seed(seed)
    base = logits_of(kind, (sessions, 1, vocabulary), generator).to(dtype)
    targets = torch.randperm(3 * vocabulary, generator=generator)[:vocabulary].sort().values
    rules = rules_of(sessions, 1, generator)
    hidden = torch.zeros(sessions, 1, 4, dtype=dtype)
    anchors = torch.zeros(sessions, dtype=torch.int64)
    got = run(base, hidden, anchors, DraftHead(targets), rules, candidates)
    k = min(candidates, vocabulary)
    assert got.candidate_ids.shape == (sessions, 1, k)
    for s in range(sessions):
        order, law = law_of(base[s, 0].double().numpy(), k, rules, s)
        ids = targets.numpy()[order]
        # Laws are made in fp64 and drawn from in fp32.
        check_draw(int(got.tokens[s, 0]), ids, law, rules, s, 0, 1e-6)
        if rules.kinds[s] == INDEPENDENT:
            assert got.candidate_ids[s, 0].tolist() == ids.tolist()
            np.testing.assert_allclose(got.candidate_probs[s, 0].numpy(), law, rtol=1e-6)
        else:
            assert not got.candidate_ids[s].any()
            assert not got.candidate_probs[s].any()
    greedy = replace_kinds(rules, GREEDY)
    alone = run(base, hidden, anchors, DraftHead(targets), greedy, candidates, greedy=True)
    best = targets[[int(np.argmax(row[0].double().numpy())) for row in base]]
    assert torch.equal(alone.tokens[:, 0], best)
    assert not alone.candidate_ids.any()


def replace_kinds(rules: DrawRules, kind: int) -> DrawRules:
    return replace(rules, kinds=torch.full_like(rules.kinds, kind))


@settings(max_examples=10)
@given(
    st.sampled_from(["vanilla", "gated", "rnn"]), st.sampled_from([1, 3, 17]),
    st.sampled_from([7, 65, 300]), st.sampled_from([1, 16, 24, 100]), st.sampled_from(TYPES),
    st.sampled_from([None, False, True]), st.integers(0, 2**31),
)  # fmt: skip
def test_heads(
    kind: str, sessions: int, vocabulary: int, rank: int, dtype: torch.dtype,
    confident: bool | None, seed: int,
) -> None:  # fmt: skip
    """Bias, confidence and law, with what was drafted before as the reference's own."""
    size, width, most = 2, 37, vocabulary + 50
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = sequential_head(
        kind, rank, vocab_size=most, draft_vocab_size=vocabulary, hidden_size=width
    )
    assert isinstance(module, MarkovHead)
    torch.nn.init.normal_(module.markov_w2.weight, std=1.5 / rank**0.5)
    module = module.to(DEVICE, dtype).requires_grad_(False)
    w1, w2 = module.markov_w1.weight, module.markov_w2.weight
    head = DraftHead(torch.randperm(most, generator=generator)[:vocabulary].sort().values, w1, w2)
    if kind != "vanilla":
        head = replace(head, step=module.step, first_state=module.first_state)
    weight = torch.randn(width + rank * bool(confident), generator=generator).to(dtype)
    if confident is not None:
        head = replace(head, confidence=weight, confidence_bias=torch.tensor([0.3], dtype=dtype))
    base = logits_of("plain", (sessions, size, vocabulary), generator).to(dtype)
    hidden = torch.randn(sessions, size, width, generator=generator).to(dtype)
    anchors = torch.randint(0, most, (sessions,), generator=generator)
    rules = replace(rules_of(sessions, size, generator), top_p=torch.ones(sessions))
    got = run(base, hidden, anchors, head, rules, 16)

    k, state = min(16, vocabulary), module.first_state(sessions)
    for position in range(size):
        previous = got.tokens[:, position - 1] if position else anchors
        embedded = module.embed(previous.to(DEVICE))
        code, state = module.step(embedded, hidden[:, position].to(DEVICE), state)
        bias = code.double().cpu() @ w2.double().cpu().T
        logits = (base[:, position].double() + bias).numpy()
        seen = torch.cat([hidden[:, position], embedded.cpu()], 1).double()
        score = seen[:, : len(weight)] @ weight.double() + float(torch.tensor(0.3, dtype=dtype))
        if confident is None:
            score = torch.logit(torch.from_numpy(logits).softmax(1).amax(1), eps=1e-6)
        # sums of fp32, in another order; fp16's and bf16's products are exact in it
        torch.testing.assert_close(
            got.confidence_logits[:, position].double(), score, atol=2e-4, rtol=1e-4
        )
        for s in range(sessions):
            order, law = law_of(logits[s], k, rules, s)
            ids = head.vocabulary.numpy()[order]
            check_draw(int(got.tokens[s, position]), ids, law, rules, s, position, 1e-4)
            if rules.kinds[s] == INDEPENDENT:
                assert got.candidate_ids[s, position].tolist() == ids.tolist()
                np.testing.assert_allclose(got.candidate_probs[s, position], law, atol=1e-5)


def test_a_session_drafts_what_it_drafts_alone() -> None:
    """To the bit, wherever it stands among others."""
    generator = torch.Generator().manual_seed(5)
    sessions, size, vocabulary, rank, width = 19, 2, 130, 24, 40
    base = torch.randn(sessions, size, vocabulary, generator=generator) * 2
    hidden = torch.randn(sessions, size, width, generator=generator)
    anchors = torch.randint(0, vocabulary, (sessions,), generator=generator)
    rules = rules_of(sessions, size, generator)
    head = DraftHead(
        torch.arange(vocabulary),
        torch.randn(vocabulary, rank, generator=generator),
        torch.randn(vocabulary, rank, generator=generator) / 4,
        confidence=torch.randn(width + rank, generator=generator),
        confidence_bias=torch.zeros(1),
    )
    whole = run(base, hidden, anchors, head, rules, 64)
    for chosen in ([0], [4], [10], [17], [18, 7, 11]):
        own = DrawRules(*(t[chosen] for t in rules.tensors))
        some = run(base[chosen], hidden[chosen], anchors[chosen], head, own, 64)
        for got, want in zip(some.tensors, whole.tensors, strict=True):
            assert torch.equal(got, want[chosen])


def test_a_whole_vocabulary() -> None:
    """Of Qwen's size: thousands of chunks, the likeliest tokens in the last and ties far apart."""
    vocabulary = 151_936
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 1, vocabulary, generator=generator)
    base[0, 0, [3, 70_000, 151_935]] = 9.0
    base[0, 0, 151_900:151_910] = 8.0
    rules = replace_kinds(rules_of(1, 1, generator), INDEPENDENT)
    rules = replace(rules, top_k=torch.tensor([0]), top_p=torch.ones(1))
    got = run(
        base, torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int64),
        DraftHead(torch.arange(vocabulary)), rules, 64,
    )  # fmt: skip
    ids, law = law_of(base[0, 0].double().numpy(), 64, rules, 0)
    assert got.candidate_ids[0, 0].tolist() == ids.tolist()
    assert ids[:4].tolist() == [3, 70_000, 151_935, 151_900]
    np.testing.assert_allclose(got.candidate_probs[0, 0], law, rtol=1e-6)


def test_cuts_at_their_very_edges() -> None:
    """Four tokens of a quarter each: mass 0.5 is reached by two, though a third would touch it."""
    base = torch.full((5, 1, 70), float("-inf"))
    base[:, 0, [69, 2, 64, 30]] = torch.tensor([-0.0, 0.0, 0.0, -0.0])
    rules = DrawRules(
        kinds=torch.full((5,), INDEPENDENT),
        temperature=torch.ones(5),
        top_k=torch.tensor([0, 0, 3, 1, 4]),
        top_p=torch.tensor([0.5, 0.51, 1.0, 1.0, 1e-6]),
        keys=torch.arange(5)[:, None],
    )
    head, anchors = DraftHead(torch.arange(70) * 2), torch.zeros(5, dtype=torch.int64)
    got = run(base, torch.zeros(5, 1, 4), anchors, head, rules, 6)
    assert got.candidate_ids[:, 0, :4].tolist() == [[4, 60, 128, 138]] * 5
    shares = [[1 / n] * n + [0.0] * (6 - n) for n in (2, 3, 3, 1, 1)]
    np.testing.assert_allclose(got.candidate_probs[:, 0].numpy(), shares, rtol=1e-6)


def test_too_many_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_CANDIDATES}"):
        run(
            torch.zeros(1, 1, 9), torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int64),
            DraftHead(torch.arange(9)), rules_of(1, 1, torch.Generator()), MOST_CANDIDATES + 1,
        )  # fmt: skip


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0}, {"confidence": False},
        {"draft_vocab": 70}, {"final_logit_softcapping": 2.0}, {"rank": 0, "confidence": False},
    ],
)  # fmt: skip
def test_a_drafter_draws_by_them(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 a drafter's laws and scores are those of its modules; sessions are padded."""
    family = "gemma2" if "final_logit_softcapping" in shape else "llama"
    drafter = tiny_drafter(tiny_target(family, vocab=200), 3, **shape)
    drafter = drafter.for_inference(torch.float32, DEVICE)
    width, generator = drafter.config.hidden_size, torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 3, width, generator=generator).to(DEVICE)
    anchors = torch.tensor([5, 9, 1])
    rules = rules_of(3, 3, generator)
    monkeypatch.setenv("DSPARK_KERNELS", "reference")
    modules = ModuleDraftForward(copy.deepcopy(drafter))
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    kernels = ModuleDraftForward(drafter)
    before = launches["draw_position"]
    with torch.inference_mode():
        want = modules.draw(hidden, anchors, rules, 8)
        assert launches["draw_position"] == before
        got = kernels.draw(hidden, anchors, rules, 8)
        assert launches["draw_position"] > before
        wide = kernels.draw(hidden, anchors, rules, MOST_CANDIDATES + 1)
    # The draws are fixed and none is near an edge, so that fp32's rounding changes none.
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.candidate_ids, want.candidate_ids)
    torch.testing.assert_close(got.candidate_probs, want.candidate_probs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.confidence_logits, want.confidence_logits, atol=1e-4, rtol=1e-4)
    assert wide.candidate_ids.shape[2] == min(MOST_CANDIDATES + 1, drafter.config.draft_vocab_size)


def test_padded_draws_are_those_of_the_sessions_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One shape serves several numbers of sessions, and an older answer outlives newer ones."""
    monkeypatch.setattr("dspark.models.captured_draw._MOST_SESSIONS", 4)
    shapes: list[tuple[int, ...]] = []
    head, generator = DraftHead(torch.arange(40)), torch.Generator().manual_seed(0)
    there = on(DEVICE, head)

    def draw(
        hidden: torch.Tensor, anchors: torch.Tensor, rules: DrawRules, k: int, greedy: bool
    ) -> DrawnBlocks:
        shapes.append((*hidden.shape, k, greedy))
        return draw_blocks(
            hidden, hidden, anchors, there, rules, k, greedy=greedy
        )  # the hidden states serve as logits

    steps = CapturedDraw(draw, torch.device(DEVICE), capture=DEVICE == "cuda")
    kept = []
    for sessions in (3, 4, 1, 3, 5):
        hidden = torch.randn(sessions, 2, 40, generator=generator)
        anchors = torch.zeros(sessions, dtype=torch.int64)
        rules = rules_of(sessions, 2, generator)
        if sessions == 1:
            rules = replace_kinds(rules, GREEDY)
        got = steps.run(hidden.to(DEVICE), anchors, rules, 8)
        kept.append((got, run(hidden, hidden, anchors, head, rules, 8)))
    for got, want in kept:
        for left, right in zip(got.tensors, want.tensors, strict=True):
            assert torch.equal(left.cpu(), right)
    assert set(shapes) == {(4, 2, 40, 8, False), (1, 2, 40, 8, True), (5, 2, 40, 8, False)}
