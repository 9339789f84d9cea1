"""The served drafter against the paper's equations (§2, §3.1, §3.2), written out here anew.

Nothing is shared with the implementation but the weights: norms, rotary embedding, attention, MLP
and heads are plain formulas, block by block, and laws are compared through the whole draft engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import tiny_drafter, tiny_target

from dspark.engine.drafting import DraftEngine
from dspark.models.drafter import DSparkDrafter
from dspark.types import DraftWork, Fence, SamplingParams

SIZE = 4
HEADS, KV_HEADS, WIDTH = 4, 2, 8  # of the tiny shape
EPS = 1e-6
Weights = dict[str, torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # [n, heads, D], [n]
    """Pairs (i, i + D/2) turn by position · 10000^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def layer(
    w: Weights, x: torch.Tensor, features: torch.Tensor, start: int, window: int
) -> torch.Tensor:
    """One layer over a block [rows, d] that starts at `start`, after features [start, d]."""
    rows = len(x)
    here = rms(x, w["input_layernorm.weight"])
    both = torch.cat([features, here])  # K = [W_K H_ctx ; W_K H_d]
    places = torch.arange(start + rows, dtype=torch.float32)

    def heads(y: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return (y @ w[f"self_attn.{name}_proj.weight"].T).view(-1, count, WIDTH)

    q = heads(here, "q", HEADS)
    k = heads(both, "k", KV_HEADS)
    v = heads(both, "v", KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=1)
    if "self_attn.q_norm.weight" in w:
        q, k = rms(q, w["self_attn.q_norm.weight"]), rms(k, w["self_attn.k_norm.weight"])
    q = rotated(q, places[start:])
    k = rotated(k, places).repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5
    if window:  # the block sees so many rows of context, and all of itself
        scores[:, :, : max(0, start - window)] = -torch.inf
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(rows, -1)
    x = x + out @ w["self_attn.o_proj.weight"].T
    y = rms(x, w["post_attention_layernorm.weight"])
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    return x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T


@dataclass(frozen=True)
class Block:
    laws: torch.Tensor  # [γ, V_d]
    confidences: torch.Tensor  # [γ]


def reference(drafter: DSparkDrafter, taps: torch.Tensor, anchor: int, drawn: list[int]) -> Block:
    """What the equations say of a block whose tokens were `drawn`."""
    config, w = drafter.config, drafter.state_dict()
    features = rms(taps @ w["fc.weight"].T, w["hidden_norm.weight"])
    masks = SIZE - 1 if config.sample_from_anchor else SIZE
    x = drafter.embed_weight[[anchor, *[config.mask_token_id] * masks]]
    for n in range(2):
        mine = {k.split(".", 2)[2]: t for k, t in w.items() if k.startswith(f"layers.{n}.")}
        x = layer(mine, x, features, len(taps), config.context_window)
    hidden = rms(x, w["norm.weight"])[-SIZE:]
    laws, confidences = [], []
    state = torch.zeros(config.markov_rank)
    for h, before in zip(hidden, [anchor, *drawn[:-1]], strict=True):
        logits = drafter.head_weight @ h
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
    engine = DraftEngine(drafter, num_pages=2 + (len(taps) + SIZE) // 16)
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


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("context", [0, 1, 100, 9000])
def test_the_served_block_is_what_the_equations_say(
    head: str, from_anchor: bool, context: int
) -> None:
    target = tiny_target("qwen3")
    kind = {"rank": 0} if head == "none" else {"head": head}
    drafter = tiny_drafter(target, SIZE, draft_vocab=24, from_anchor=from_anchor, **kind)
    taps = torch.randn(context, 64, generator=torch.Generator().manual_seed(context))
    drawn, got = served(drafter, taps, anchor=7)
    want = reference(drafter, taps, 7, drawn)
    torch.testing.assert_close(got.laws, want.laws, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(got.confidences, want.confidences, atol=1e-4, rtol=0.0)
    assert want.laws.std(0).max() > 3e-3, "positions must differ for this to say anything"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("window", [0, 20])
def test_other_families_and_windows(family: str, window: int) -> None:
    target = tiny_target(family)
    drafter = tiny_drafter(target, SIZE, window=window)
    taps = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    drawn, got = served(drafter, taps, anchor=3)
    want = reference(drafter, taps, 3, drawn)
    torch.testing.assert_close(got.laws, want.laws, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(got.confidences, want.confidences, atol=1e-4, rtol=0.0)


def test_the_anchor_stands_right_after_the_context() -> None:
    """Were its row, or its context, one place off, the laws would be others."""
    target = tiny_target("qwen3")
    drafter = tiny_drafter(target, SIZE)
    taps = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    drawn, got = served(drafter, taps, anchor=7)
    for wrong in (taps[1:], taps[:-1], torch.cat([taps[:1], taps])):
        off = reference(drafter, wrong, 7, drawn)
        assert (got.laws - off.laws).abs().max() > 1e-2
