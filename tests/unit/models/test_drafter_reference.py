"""The served drafter against the paper's equations (§2, §3.1, §3.2), written out here anew.

Nothing is shared with the implementation but the weights: norms, rotary embedding, attention, MLP
and heads are plain formulas, block by block, and laws are compared through the whole draft engine.
What a family's layers are like is written out, too, and not read from the drafter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.families import KINDS, LLAMA_LIKE, WINDOW, drafter_of

from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.models.drafter import DSparkDrafter
from dspark.types import DraftWork, Fence, SamplingParams

SIZE = 4
HEADS = 4  # of the tiny shape
EPS = 1e-6
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """How one layer attends."""

    kv_heads: int = 2
    width: int = 8
    scale: float = 8**-0.5
    window: int = 0  # a row sees positions after its own less this; 0: all
    softcap: float = 0.0
    theta: float = 10000.0
    turned: float = 1.0  # share of each head that the rotary embedding turns
    value_norm: bool = False


@dataclass(frozen=True)
class Family:
    """A family's equations."""

    layers: tuple[Layer, Layer] = (Layer(), Layer())
    offset: float = 0.0  # norms multiply by this plus their weight
    embedded: float = 1.0  # what embedded tokens are multiplied by
    gelu: bool = False
    sandwich: bool = False  # norms after attention and MLP, too
    softcap: float = 0.0  # of the base logits


ROOT = math.sqrt(32)  # of the width
_GEMMA = Family(offset=1.0, embedded=ROOT, gelu=True)
_GEMMA4_LAYER = Layer(1, 16, 1.0, theta=1e6, turned=0.25, value_norm=True)
GEMMA4 = Family(
    (_GEMMA4_LAYER, _GEMMA4_LAYER), embedded=ROOT, gelu=True, sandwich=True, softcap=2.0
)
FAMILIES = {
    **dict.fromkeys(LLAMA_LIKE, Family()),
    **{f"{name}, sliding": Family((Layer(window=WINDOW), Layer())) for name in LLAMA_LIKE},
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        layers=(Layer(scale=0.5, softcap=1.5, window=WINDOW), Layer(scale=0.5, softcap=1.5)),
        sandwich=True,
        softcap=2.0,
    ),
    "gemma3": replace(
        _GEMMA,
        layers=(Layer(scale=0.25, window=WINDOW), Layer(scale=0.25, theta=1e6)),
        sandwich=True,
    ),
    "gemma4": GEMMA4,
    "gemma4, mixed": replace(
        GEMMA4,
        layers=(
            Layer(2, 8, 1.0, window=WINDOW, value_norm=True),
            replace(_GEMMA4_LAYER, kv_heads=2),
        ),
    ),
}
assert FAMILIES.keys() == KINDS.keys()


def rms(x: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: torch.Tensor, positions: torch.Tensor, layer: Layer) -> torch.Tensor:
    """[n, heads, D], [n]: pairs (i, i + D/2) turn by position · theta^(-2i/D), the first ones."""
    half = x.shape[-1] // 2
    frequency = layer.theta ** (-torch.arange(half) / half)
    frequency[int(layer.turned * half) :] = 0.0
    angle = positions[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(
    w: Weights,
    family: Family,
    layer: Layer,
    here: torch.Tensor,  # [rows, d]
    features: torch.Tensor,  # [start, d]
    context_window: int,
) -> torch.Tensor:
    rows, start = len(here), len(features)
    both = torch.cat([features, here])  # K = [W_K H_ctx ; W_K H_d]
    places = torch.arange(start + rows, dtype=torch.float32)

    def heads(y: torch.Tensor, name: str) -> torch.Tensor:
        bias = w.get(f"self_attn.{name}_proj.bias", torch.zeros(1))
        return (y @ w[f"self_attn.{name}_proj.weight"].T + bias).view(len(y), -1, layer.width)

    q, k = heads(here, "q"), heads(both, "k")
    v = heads(both, "v") if "self_attn.v_proj.weight" in w else k
    if layer.value_norm:
        v = rms(v, 1.0)
    if "self_attn.q_norm.weight" in w:
        q = rms(q, family.offset + w["self_attn.q_norm.weight"])
        k = rms(k, family.offset + w["self_attn.k_norm.weight"])
    assert k.shape[1] == v.shape[1] == layer.kv_heads
    q, k = rotated(q, places[start:], layer), rotated(k, places, layer)
    k, v = (t.repeat_interleave(HEADS // layer.kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if context_window:  # the block sees so many rows of context, and all of itself
        scores[:, :, : max(0, start - context_window)] = -torch.inf
    for row in range(rows if layer.window else 0):
        scores[:, row, : max(0, start + row - layer.window + 1)] = -torch.inf
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(rows, -1)
    return out @ w["self_attn.o_proj.weight"].T


def run_layer(
    w: Weights,
    family: Family,
    layer: Layer,
    x: torch.Tensor,
    features: torch.Tensor,
    context_window: int,
) -> torch.Tensor:
    """One layer over a block [rows, d] after features [start, d]."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return rms(y, family.offset + w[f"{name}layernorm.weight"])

    attended = attention(w, family, layer, norm(x, "input_"), features, context_window)
    x = x + (norm(attended, "post_attention_") if family.sandwich else attended)
    y = norm(x, "pre_feedforward_" if family.sandwich else "post_attention_")
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    if family.gelu:
        cube = gate + 0.044715 * gate**3
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * cube))
    else:
        gate = gate * gate.sigmoid()
    mixed = (gate * up) @ w["mlp.down_proj.weight"].T
    x = x + (norm(mixed, "post_feedforward_") if family.sandwich else mixed)
    return x * w.get("layer_scalar", torch.ones(1))


@dataclass(frozen=True)
class Block:
    laws: torch.Tensor  # [γ, V_d]
    confidences: torch.Tensor  # [γ]


def reference(
    drafter: DSparkDrafter, family: Family, taps: torch.Tensor, anchor: int, drawn: list[int]
) -> Block:
    """What the equations say of a block whose tokens were `drawn`."""
    config, w = drafter.config, drafter.state_dict()
    features = rms(taps @ w["fc.weight"].T, family.offset + w["hidden_norm.weight"])
    masks = SIZE - 1 if config.sample_from_anchor else SIZE
    x = drafter.embed_weight[[anchor, *[config.mask_token_id] * masks]] * family.embedded
    for n, layer in enumerate(family.layers):
        mine = {k.split(".", 2)[2]: t for k, t in w.items() if k.startswith(f"layers.{n}.")}
        x = run_layer(mine, family, layer, x, features, config.context_window)
    hidden = rms(x, family.offset + w["norm.weight"])[-SIZE:]
    laws, confidences = [], []
    state = torch.zeros(config.markov_rank)
    for h, before in zip(hidden, [anchor, *drawn[:-1]], strict=True):
        logits = drafter.head_weight @ h
        if family.softcap:
            logits = family.softcap * torch.tanh(logits / family.softcap)
        e = torch.zeros(0)
        if config.markov_rank:
            e = w["markov_head.markov_w1.weight"][before]
            code = e
            if config.markov_head_type == "gated":
                gate = w["markov_head.gate_proj.weight"] @ torch.cat([h, e])
                code = (gate + w["markov_head.gate_proj.bias"]).sigmoid() * e
            if config.markov_head_type == "rnn":
                joint = w["markov_head.joint_proj.weight"] @ torch.cat([state, e, h])
                g, c, o = (joint + w["markov_head.joint_proj.bias"]).chunk(3)
                state = g.sigmoid() * state + (1 - g.sigmoid()) * c.tanh()
                code = o.tanh()
            logits = logits + w["markov_head.markov_w2.weight"] @ code
        laws.append(logits.softmax(-1))
        seen = torch.cat([h, e])[: w["confidence_head.proj.weight"].shape[1]]
        score = w["confidence_head.proj.weight"][0] @ seen + w["confidence_head.proj.bias"][0]
        confidences.append(score.sigmoid())
    return Block(torch.stack(laws), torch.stack(confidences))


def served(drafter: DSparkDrafter, taps: torch.Tensor, anchor: int) -> tuple[list[int], Block]:
    """Drawn tokens, and their block as the draft engine gives it."""
    engine = DraftEngine(DSparkBlocks(drafter), num_pages=2 + (len(taps) + SIZE) // 16)
    with torch.no_grad():
        features = drafter.feature_projection(taps)
    work = DraftWork(
        fence=Fence("s", 0, 0, len(taps) + 1),
        feature_start=0,
        features=features,
        anchor_token_id=anchor,
        block_size=SIZE,
        sampling=SamplingParams(temperature=1.0, seed=5),
    )
    proposals, resyncs = engine.run([work])
    assert not resyncs
    (block,) = proposals
    assert block.candidate_ids is not None
    assert block.candidate_probs is not None
    ids, probs = torch.from_numpy(block.candidate_ids), torch.from_numpy(block.candidate_probs)
    laws = torch.zeros(SIZE, drafter.config.vocab_size).scatter_(1, ids, probs)
    return block.token_ids.tolist(), Block(
        laws[:, drafter.draft_token_ids], torch.from_numpy(block.confidences)
    )


shared = cache(drafter_of)  # nothing here changes one


def taps_of(context: int) -> torch.Tensor:
    return torch.randn(context, 64, generator=torch.Generator().manual_seed(context))


def same(drafter: DSparkDrafter, family: Family, context: int) -> Block:
    """Compares a block; gives the reference's."""
    taps = taps_of(context)
    drawn, got = served(drafter, taps, anchor=7)
    want = reference(drafter, family, taps, 7, drawn)
    torch.testing.assert_close(got.laws, want.laws, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(got.confidences, want.confidences, atol=1e-4, rtol=0.0)
    return want


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gemma4", "gemma4, mixed"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("context", [0, 1, 100, 9000])
def test_the_served_block_is_what_the_equations_say(
    family: str, head: str, from_anchor: bool, context: int
) -> None:
    kind = {"rank": 0} if head == "none" else {"head": head}
    drafter = shared(family, draft_vocab=24, from_anchor=from_anchor, **kind)
    want = same(drafter, FAMILIES[family], context)
    assert want.laws.std(0).max() > 3e-3, "positions must differ for this to say anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [0, 10, 30])
def test_families_and_windows(family: str, window: int) -> None:
    same(shared(family, window=window), FAMILIES[family], 100)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gemma4"])
def test_the_anchor_stands_right_after_the_context(family: str) -> None:
    """Were its row, or its context, one place off, the laws would be others."""
    drafter, taps = shared(family), taps_of(100)
    drawn, got = served(drafter, taps, anchor=7)
    for wrong in (taps[1:], taps[:-1], torch.cat([taps[:1], taps])):
        off = reference(drafter, FAMILIES[family], wrong, 7, drawn)
        assert (got.laws - off.laws).abs().max() > 1e-3


def layers(family: Family, **changes: Any) -> Family:
    return replace(family, layers=tuple(replace(layer, **changes) for layer in family.layers))


LAPSES: dict[str, tuple[str, Callable[[Family], Family]]] = {
    "no window": ("gemma3", lambda f: layers(f, window=0)),
    "a window one short": ("gemma3", lambda f: layers(f, window=WINDOW - 1)),
    "a window in every layer": ("gemma3", lambda f: layers(f, window=WINDOW)),
    "one frequency": ("gemma3", lambda f: layers(f, theta=10000.0)),
    "no window in qwen3": ("qwen3, sliding", lambda f: layers(f, window=0)),
    "no attention cap": ("gemma2", lambda f: layers(f, softcap=0.0)),
    "no logit cap": ("gemma4", lambda f: replace(f, softcap=0.0)),
    "all turned": ("gemma4", lambda f: layers(f, turned=1.0)),
    "no value norm": ("gemma4", lambda f: layers(f, value_norm=False)),
    "a scale": ("gemma4", lambda f: layers(f, scale=0.25)),
    "no embedding scale": ("gemma4", lambda f: replace(f, embedded=1.0)),
    "no norm offset": ("gemma2", lambda f: replace(f, offset=0.0)),
}


@pytest.mark.parametrize("lapse", LAPSES)
def test_a_lapse_would_be_noticed(lapse: str) -> None:
    name, lapsed = LAPSES[lapse]
    family, taps = FAMILIES[name], taps_of(100)
    drafter = shared(name)
    drawn, got = served(drafter, taps, anchor=7)
    off = reference(drafter, lapsed(family), taps, 7, drawn)
    assert (got.laws - off.laws).abs().max() > 1e-3
