"""Triton's verdicts against dense laws in fp64, under the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from dspark.decoding import noise
from dspark.decoding.drawing import COUPLED, GREEDY, INDEPENDENT
from dspark.decoding.noise import Stream, draw_key, key_tensor
from dspark.engine import judge as judging
from dspark.engine.judge import Judged
from dspark.kernels.cpu import operators
from dspark.kernels.cpu.operators import JudgeRules
from dspark.types import BlockProposal, Fence, Request, SamplingParams, VerifyMode

pytest.importorskip("triton")
import triton
import triton.language as tl

from dspark.kernels.triton.acceptance import WAYS, ZERO_BITS, find_cuts, judge
from dspark.kernels.triton.launch import launch, launches
from dspark.kernels.triton.noise import gumbel, mix, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A chunk's exponentials are fp32, wrong by some 1e-7 of their size. So are the masses that top-p
# compares, and the CDF that a draw is looked up in.
ROUNDING = 1e-6
NOTHING = float("-inf")
RULES = (  # temperature, top-k, top-p
    (1.0, 0, 1.0),
    (0.7, 5, 1.0),
    (1.3, 0, 0.9),
    (0.5, 900, 0.4),
    (1.0, 3, 0.75),
)

Rule = tuple[float, int, float]
Shape = tuple[int, int, Rule]  # drafts, kind, rule

kinds = st.sampled_from([GREEDY, INDEPENDENT, COUPLED])
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(
    st.tuples(st.integers(0, 4), kinds, st.sampled_from(RULES)), min_size=1, max_size=4
)
vocabularies = st.sampled_from([1, 7, 1023, 4097])
looks = st.sampled_from(["normal", "peaked", "few values", "±30", "masked"])


@dataclass
class Case:
    """A step: what `judge` takes, on the host."""

    logits: torch.Tensor
    lengths: list[int]
    drafts: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    rules: JudgeRules

    @classmethod
    def of(
        cls,
        shapes: list[Shape],
        vocabulary: int,
        look: str = "normal",
        dtype: torch.dtype = torch.float32,
        *,
        candidates: int = 8,
        seed: int = 0,
    ) -> Case:
        """Drafts are drawn among the likeliest tokens of their rows, so that many stand."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [length for length, _, _ in shapes]
        drafts, rows = sum(lengths), sum(lengths) + len(lengths)
        logits = torch.randn(rows, vocabulary, generator=generator) * 2
        if look == "peaked":
            logits *= 4
        elif look == "few values":
            logits = logits.round()
        elif look == "±30":
            logits = torch.where(logits > 1, 30.0, -30.0)
        elif look == "masked":
            hidden = torch.rand(logits.shape, generator=generator) < 0.7
            hidden[:, vocabulary // 2] = False
            logits = logits.masked_fill(hidden, NOTHING)
        logits = logits.to(dtype)
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        judging_rows = torch.arange(drafts) + owners
        guess = logits[judging_rows].float() + torch.randn(drafts, vocabulary, generator=generator)
        best = guess.topk(min(candidates, vocabulary), dim=-1)
        probs = torch.softmax(best.values.clamp(min=-40), -1)
        place = torch.multinomial(probs, 1, generator=generator) if drafts else torch.zeros(0, 1)
        of_kind = torch.tensor([kind for _, kind, _ in shapes])
        place[of_kind[owners] != INDEPENDENT] = 0
        keys = torch.randint(-(2**63), 2**63 - 1, (3, rows), generator=generator)
        rules = JudgeRules(
            kinds=of_kind,
            temperature=torch.tensor([rule[0] for _, _, rule in shapes]),
            top_k=torch.tensor([rule[1] for _, _, rule in shapes]),
            top_p=torch.tensor([rule[2] for _, _, rule in shapes]),
            accept_keys=keys[0, :drafts],
            recover_keys=keys[1, : len(shapes)],
            noise_keys=keys[2],
        )
        tokens = best.indices.gather(1, place.long())[:, 0]
        return cls(logits, lengths, tokens, best.indices, probs, rules)

    def judged(self) -> list[tuple[int, int]]:
        """(how many stand, what follows) of each sequence."""
        verdicts = judge(
            self.logits.to(DEVICE), self.lengths, self.drafts, self.ids, self.probs, self.rules
        )
        accepted, following = verdicts.tolist()
        return list(zip(accepted, following, strict=True))

    def rule(self, s: int) -> Rule:
        """Of a sequence: temperature, top-k and top-p, as the kernels read them."""
        r = self.rules
        return float(r.temperature[s]), int(r.top_k[s]), float(r.top_p[s])

    def clear(self) -> bool:
        """No row has a mass that rounding might take across top-p."""
        return all(
            law_of(row, self.rule(s))[1] > ROUNDING
            for s in range(len(self.lengths))
            if self.rules.kinds[s] != GREEDY
            for row in self.alone(s).logits
        )

    def alone(self, s: int) -> Case:
        """One sequence of it."""
        first = sum(self.lengths[:s])
        drafts = slice(first, first + self.lengths[s])
        rows = slice(first + s, first + s + self.lengths[s] + 1)
        own = slice(s, s + 1)
        r = self.rules
        rules = JudgeRules(
            r.kinds[own], r.temperature[own], r.top_k[own], r.top_p[own],
            r.accept_keys[drafts], r.recover_keys[own], r.noise_keys[rows],
        )  # fmt: skip
        return Case(
            self.logits[rows], [self.lengths[s]], self.drafts[drafts], self.ids[drafts],
            self.probs[drafts], rules,
        )  # fmt: skip


def law_of(row: torch.Tensor, rule: Rule) -> tuple[np.ndarray, float]:
    """The dense law in fp64, and how far from top-p the mass is where it is nearest."""
    temperature, top_k, top_p = rule
    x = row.double().numpy()
    scale = float(np.float32(1.0) / np.float32(temperature))
    weights = np.exp((x - x.max()) * scale)
    if 0 < top_k < len(x):
        weights[x < np.sort(x)[-top_k]] = 0.0
    law = np.divide(weights, weights.sum())
    if top_p >= 1.0:
        return law, 1.0
    order = np.argsort(-x, kind="stable")
    mass = law[order].cumsum()
    law[order[np.searchsorted(mass, top_p) + 1 :]] = 0.0
    return np.divide(law, law.sum()), float(np.abs(mass - top_p).min())


def assert_right(case: Case) -> None:
    """Every verdict is that of the dense laws; a drawn token's stretch of the CDF has the draw."""
    verdicts, r = case.judged(), case.rules
    for s in range(len(case.lengths)):
        one = case.alone(s)
        accepted, token = verdicts[s]
        kind, length = int(r.kinds[s]), one.lengths[0]
        assert 0 <= accepted <= length
        laws = [law_of(row, case.rule(s))[0] for row in one.logits]
        if kind == INDEPENDENT:
            assert_rejection(one, accepted, token, laws)
            continue
        if kind == GREEDY:
            choices = [int(row.double().numpy().argmax()) for row in one.logits]
        else:
            g = noise.gumbel(one.rules.noise_keys, torch.arange(len(laws[0]))).numpy()
            with np.errstate(divide="ignore"):
                choices = (np.log(np.stack(laws)) + g).argmax(-1).tolist()
        expected = 0
        while expected < length and choices[expected] == int(one.drafts[expected]):
            expected += 1
        assert (accepted, token) == (expected, choices[expected])


def assert_rejection(one: Case, accepted: int, token: int, laws: list[np.ndarray]) -> None:
    length, rest = one.lengths[0], laws[accepted]
    draws = noise.uniform(one.rules.accept_keys).tolist()
    for j in range(min(accepted + 1, length)):
        x = int(one.drafts[j])
        q = float(one.probs[j].double()[one.ids[j] == x].sum())
        gap = laws[j][x] - draws[j] * q
        assert gap > -ROUNDING if j < accepted else gap < ROUNDING
    if accepted < length:
        less = rest.copy()
        np.subtract.at(less, one.ids[accepted].numpy(), one.probs[accepted].double().numpy())
        less = less.clip(min=0.0)
        rest = less / less.sum() if less.sum() > 1e-9 else rest
    draw = float(noise.uniform(one.rules.recover_keys))
    cdf = rest.cumsum()
    assert rest[token] > 0.0
    assert cdf[token] - rest[token] - ROUNDING <= draw <= cdf[token] + ROUNDING


@settings(max_examples=22)
@given(shapes, vocabularies, looks, types, st.integers(0, 2**31))
def test_mixed_batches_are_judged_by_their_laws(
    shapes: list[Shape],
    vocabulary: int,
    look: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = Case.of(shapes, vocabulary, look, dtype, seed=seed)
    assume(case.clear())
    assert_right(case)


def test_a_vocabulary_of_the_usual_size() -> None:
    rules = ((1.0, 0, 1.0), (1.0, 50, 0.9), (0.8, 0, 0.6))
    shapes = [(1, INDEPENDENT, rules[1]), (1, INDEPENDENT, rules[0]), (0, COUPLED, rules[2])]
    case = Case.of([*shapes, (0, GREEDY, rules[0])], 151_936, "peaked", torch.bfloat16)
    assert case.clear()
    assert_right(case)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(INDEPENDENT, torch.float32), (COUPLED, torch.bfloat16)]
)
def test_of_equal_logits_top_p_keeps_the_first_and_top_k_all(kind: int, dtype: torch.dtype) -> None:
    """The first half; all, where top-k cannot tell them apart; and of all, the first quarter."""
    rules = [(1.0, 0, 0.5), (1.0, 10, 1.0), (1.0, 10, 0.25)]
    case = Case.of([(0, kind, rule) for rule in rules for _ in range(6)], 3000, dtype=dtype)
    case.logits.zero_()
    case.logits[:, 2999] = -60
    assert_right(case)
    tokens = [token for _, token in case.judged()]
    assert max(tokens[:6]) < 1500 <= max(tokens[6:12])
    assert max(tokens[12:]) < 750


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cut_tells_neighbouring_values_apart(dtype: torch.dtype) -> None:
    """Each of the nine values around one, and around minus one, differs in its last bit."""
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    ones = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=dtype).view(whole)
    steps = torch.tensor([8, 0, 3, 5, 1, 7, 2, 6, 4]) - 4
    logits = (ones + steps).to(whole).view(dtype).to(DEVICE)
    top_k = torch.tensor([3, 4, 3, 4], device=DEVICE)
    edges, certain = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    ties = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(4, device=DEVICE)
    kinds = torch.full((4,), COUPLED, device=DEVICE)
    launch(
        find_cuts, (4,), edges, ties, logits, rows, kinds, certain, top_k, certain, 9, 9,
        ZERO_BITS=ZERO_BITS[dtype], WAYS=WAYS, BLOCK=16,
    )  # fmt: skip
    ordered = logits.float().sort(dim=1, descending=True).values
    assert torch.equal(edges, ordered[rows, top_k - 1])
    assert ties.tolist() == [9] * 4


def test_all_stand_or_the_first_is_refused() -> None:
    """Over more drafts than are judged at once, on and beside its bounds."""
    lengths = [1, 15, 16, 17, 35]
    plain = (1.0, 0, 1.0)
    for kind in (GREEDY, COUPLED, INDEPENDENT):
        case = Case.of([(length, kind, plain) for length in lengths], 50, seed=kind)
        case.logits[:] = NOTHING
        rows = torch.arange(len(case.logits))
        case.logits[rows, rows % 50] = 0.0
        starts = np.cumsum([0, *(length + 1 for length in lengths)])
        own = [torch.arange(a, b - 1) % 50 for a, b in pairwise(starts)]
        case.drafts = torch.cat(own)
        case.ids = case.drafts[:, None]
        case.probs = torch.ones(len(case.drafts), 1)
        bonus = [int(end - 1) % 50 for end in starts[1:]]
        assert case.judged() == list(zip(lengths, bonus, strict=True))
        case.drafts = (case.drafts + 1) % 50
        case.ids = case.drafts[:, None]
        assert case.judged() == [(0, int(start) % 50) for start in starts[:-1]]
        one_wrong = case.alone(4)
        one_wrong.drafts = own[4].clone()
        one_wrong.drafts[20] = 49
        one_wrong.ids = one_wrong.drafts[:, None]
        assert one_wrong.judged() == [(20, int(starts[4] + 20) % 50)]


def test_a_refused_draft_from_the_targets_own_law_leaves_that_law() -> None:
    """p = q, but for a draft that neither has: nothing is left of p - q."""
    case = Case.of([(1, INDEPENDENT, (1.0, 0, 1.0))] * 12, 5)
    case.logits[:] = torch.tensor([0.0, 0.0, NOTHING, 0.0, 0.0])
    case.drafts[:] = 2
    case.ids = torch.tensor([0, 1, 3, 4]).expand(12, 4)
    case.probs = torch.full((12, 4), 0.25)
    draws = noise.uniform(case.rules.recover_keys)
    expected = torch.tensor([0, 1, 3, 4])[(draws * 4).long()].tolist()
    assert len(set(expected)) == 4
    assert case.judged() == [(0, token) for token in expected]


@settings(max_examples=5)
@given(shapes, types, st.integers(0, 2**31))
def test_a_verdict_depends_neither_on_the_batch_nor_on_padding(
    shapes: list[Shape], dtype: torch.dtype, seed: int
) -> None:
    """Nor on where rows lie: here within wider ones, of NaN."""
    case = Case.of(shapes, 2500, "normal", dtype, seed=seed)
    together = case.judged()
    assert [case.alone(s).judged()[0] for s in range(len(shapes))] == together
    wide = torch.full((len(case.logits), 2600), float("nan"), dtype=dtype)
    wide[:, 40:2540] = case.logits
    padding = torch.nn.functional.pad
    padded = replace(
        case,
        logits=wide[:, 40:2540],
        ids=padding(case.ids, (0, 7)),
        probs=padding(case.probs, (0, 7)),
    )
    assert padded.judged() == together
    across = replace(case, logits=case.logits.t().contiguous().t())
    assert across.judged() == together


def test_a_candidate_that_comes_twice_counts_with_all_of_its_probability() -> None:
    case = Case.of([(2, INDEPENDENT, (1.0, 0, 1.0))] * 6, 30, "peaked", seed=3)
    once = case.judged()
    assert any(accepted < 2 for accepted, _ in once)
    twice = torch.cat([case.probs * 0.25, case.probs * 0.75], 1)  # exact but for one rounding
    assert replace(case, ids=case.ids.repeat(1, 2), probs=twice).judged() == once


@pytest.mark.skipif(not operators.available(), reason="needs AVX2 and a C++ compiler")
@settings(max_examples=10)
@given(shapes, vocabularies, looks, types, st.integers(0, 2**31))
def test_the_cpu_operator_comes_to_the_same_verdicts(
    shapes: list[Shape],
    vocabulary: int,
    look: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = Case.of(shapes, vocabulary, look, dtype, seed=seed)
    assume(case.clear())
    accepted, following = operators.judge(
        case.logits.float(), case.lengths, case.drafts, case.ids, case.probs, case.rules
    )
    assert case.judged() == list(zip(accepted.tolist(), following.tolist(), strict=True))


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4))
def test_the_engine_comes_to_the_verdicts_of_the_torch_reference(
    requests: list[tuple[int, int]],
) -> None:
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 20, "top_p": 0.8},
        {"mode": VerifyMode.COUPLED},
        {"mode": VerifyMode.COUPLED, "top_p": 0.8},
        {"mode": VerifyMode.COUPLED, "top_k": 7, "temperature": 0.5},
    ]
    generator = torch.Generator().manual_seed(len(requests))
    judged, parts = [], []
    for i, (length, rule) in enumerate(requests):
        logits = torch.randn(length + 1, 300, generator=generator) * 4
        best = logits[:-1].topk(5)
        fence = Fence(str(i), 0, 3, 30)
        proposal = BlockProposal(
            fence,
            best.indices[:, 0].numpy(),
            np.ones(length, dtype=np.float32),
            best.indices.numpy(),
            torch.softmax(best.values, -1).numpy(),
        )
        sampling = SamplingParams(seed=i, **rules[rule])
        request = Request(str(i), (0,) * 30, sampling)
        judged.append(Judged(request, fence, proposal if length else None, length))
        parts.append(logits)
    logits = torch.cat(parts).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "has_triton", lambda _: True)
        before = launches["decide"]
        verdicts = judging.judge(logits, judged)
        assert launches["decide"] == before + 1
        patch.setattr(judging, "_has_operator", lambda _: False)
        assert verdicts == judging.judge(logits, judged)


@pytest.mark.statistical
def test_what_is_emitted_follows_the_target_law() -> None:
    """χ² over 300 blocks of one draft; fails by chance once in a million sets of seeds.

    The drafter is far from the target: were p itself drawn from after a refusal, χ² would be near
    68, where one in a million sets of seeds reaches 31.
    """
    count = 300
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    q = torch.tensor([0.97, 0.01, 0.01, 0.01])
    case = Case.of([(1, INDEPENDENT, (1.0, 0, 1.0))] * count, 4)

    def keys(stream: Stream) -> torch.Tensor:
        return key_tensor([draw_key(seed, stream, 0, 0) for seed in range(count)])

    case.logits = p.log().expand(2 * count, 4)
    draws = noise.uniform(keys(Stream.DRAFT))
    case.drafts = torch.searchsorted(q.double().cumsum(0), draws, right=True).clamp(max=3)
    case.ids = torch.arange(4).expand(count, 4)
    case.probs = q.expand(count, 4)
    case.rules = replace(
        case.rules, accept_keys=keys(Stream.ACCEPT), recover_keys=keys(Stream.RECOVER)
    )
    emitted = [
        int(case.drafts[s]) if accepted else token
        for s, (accepted, token) in enumerate(case.judged())
    ]
    seen = np.bincount(emitted, minlength=4)
    assert stats.chisquare(seen, (p.double() / p.double().sum()).numpy() * count).pvalue > 1e-6


@triton.jit
def draw_all(words, uniforms, gumbels, keys, count: tl.constexpr):
    i = tl.arange(0, count)
    key = tl.load(keys + i)
    tl.store(words + i, mix(key.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True))
    tl.store(uniforms + i, uniform(key))
    tl.store(gumbels + i, gumbel(tl.load(keys), i.to(tl.int64)))


def test_the_noise_is_that_of_the_reference() -> None:
    edges = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1])
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    keys[1:6] = edges
    words = torch.empty(256, dtype=torch.int64, device=DEVICE)
    uniforms, gumbels = torch.empty(2, 256, dtype=torch.float64, device=DEVICE)
    launch(draw_all, (1,), words, uniforms, gumbels, keys.to(DEVICE), count=256)
    assert torch.equal(words.cpu(), noise._mix(keys))
    assert torch.equal(uniforms.cpu(), noise.uniform(keys))
    expected = noise.gumbel(keys[:1], torch.arange(256))[0]
    # two logarithms, each right to an ulp or two
    torch.testing.assert_close(gumbels.cpu(), expected, rtol=1e-13, atol=1e-13)


def test_cuts_are_looked_for_only_where_some_rule_cuts() -> None:
    before = launches["find_cuts"]
    Case.of([(0, GREEDY, (1.0, 3, 0.5)), (0, COUPLED, (1.0, 7, 1.0))], 7).judged()
    assert launches["find_cuts"] == before
    Case.of([(0, COUPLED, (1.0, 6, 1.0))], 7).judged()
    assert launches["find_cuts"] == before + 1


@pytest.mark.parametrize("value", [NOTHING, float("nan")])
def test_rows_that_say_nothing_still_name_a_token(value: float) -> None:
    shapes = [(1, kind, rule) for kind in (GREEDY, INDEPENDENT, COUPLED) for rule in RULES[:3]]
    case = Case.of(shapes, 7)
    case.logits[:] = value
    assert all(0 <= token < 7 for _, token in case.judged())


def test_what_lies_outside_is_refused() -> None:
    case = Case.of([(1, GREEDY, RULES[0])], 7)
    case.drafts[0] = 7
    with pytest.raises(ValueError, match=r"must lie in 0\.\.6"):
        case.judged()
    case = Case.of([(1, GREEDY, RULES[0])], 7)
    with pytest.raises(ValueError, match=r"accept_keys must be \(1,\)"):
        replace(case, rules=replace(case.rules, accept_keys=torch.zeros(2).long())).judged()
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        replace(case, logits=case.logits.double()).judged()
