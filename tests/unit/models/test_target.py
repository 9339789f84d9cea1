"""The target over pages equals transformers on whole sequences, however the work is cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import TAPS, hf_model

from dspark.errors import CheckpointError
from dspark.kernels.attention_plan import PAGE_SIZE, Pages, plan_attention
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel

SLIDING = {"sliding_window": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": SLIDING,
    "gemma2": {**SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
}
LENGTHS = (37, 5, 60)
# Rows of each sequence in each step: whole prompts, chunks, single rows and blocks side by side.
STEPS = ((20, 5, 0), (1, 0, 33), (16, 0, 1), (0, 0, 26))


def batch_of(
    rows: tuple[int, ...], done: list[int], tokens: list[torch.Tensor], pages: list[Pages]
) -> TargetBatch:
    active = [s for s, n in enumerate(rows) if n]
    return TargetBatch(
        token_ids=torch.cat([tokens[s][done[s] : done[s] + rows[s]] for s in active]),
        attention=plan_attention(
            [pages[s] for s in active], [done[s] for s in active], [rows[s] for s in active]
        ),
        logit_rows=torch.arange(sum(rows)),
    )


def largest_difference(family: str, reference_extra: dict[str, Any]) -> tuple[float, float]:
    """Of logits and of taps, between paged steps and one plain forward a sequence."""
    extra = FAMILIES[family]
    reference = hf_model(family, vocab=64, **{**extra, **reference_extra})
    target = TargetModel(hf_model(family, vocab=64, **extra), TAPS)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 64, (n,), generator=generator) for n in LENGTHS]
    shuffled = torch.randperm(15, generator=generator).numpy().astype("int32") + 1
    each = -(-max(LENGTHS) // PAGE_SIZE)
    pages = [shuffled[s * each : (s + 1) * each] for s in range(3)]
    kv = PagedKVCache(16)
    done = [0, 0, 0]
    logits: list[list[torch.Tensor]] = [[], [], []]
    taps: list[list[torch.Tensor]] = [[], [], []]
    for rows in STEPS:
        out = target.forward(batch_of(rows, done, tokens, pages), kv)
        assert out.taps is not None
        start = 0
        for s, n in enumerate(rows):
            logits[s].append(out.logits[start : start + n])
            taps[s].append(out.taps[start : start + n])
            start += n
            done[s] += n
    assert done == list(LENGTHS)
    worst_logits = worst_taps = 0.0
    for s, ids in enumerate(tokens):
        with torch.inference_mode():
            want = reference(ids[None], output_hidden_states=True)
        hidden = torch.cat([want.hidden_states[i + 1][0] for i in TAPS], dim=-1)
        worst_logits = max(worst_logits, float((torch.cat(logits[s]) - want.logits[0]).abs().max()))
        worst_taps = max(worst_taps, float((torch.cat(taps[s]) - hidden).abs().max()))
    return worst_logits, worst_taps


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_steps_equal_one_forward(family: str) -> None:
    # fp32; the reference sums keys in another order
    logits, taps = largest_difference(family, {})
    assert logits < 1e-4
    assert taps < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_sequences_equal_one_forward_each(family: str) -> None:
    extra = FAMILIES[family]
    reference = hf_model(family, vocab=64, **extra)
    target = TargetModel(hf_model(family, vocab=64, **extra), TAPS)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 64, (n,), generator=generator) for n in LENGTHS]
    rows = torch.arange(0, sum(LENGTHS), 3)
    out = target.forward_whole(texts, rows)
    with torch.inference_mode():
        want = [reference(ids[None], output_hidden_states=True) for ids in texts]
    logits = torch.cat([one.logits[0] for one in want])
    taps = [torch.cat([one.hidden_states[i + 1][0] for i in TAPS], dim=-1) for one in want]
    assert out.taps is not None
    torch.testing.assert_close(out.logits, logits[rows], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(out.taps, torch.cat(taps), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "without"),
    [("mistral", {"sliding_window": None}), ("gemma2", {"attn_logit_softcapping": None})],
)
def test_the_comparison_notices_what_is_left_out(family: str, without: dict[str, Any]) -> None:
    assert largest_difference(family, without)[0] > 0.01


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("by_layer_type", [False, True])
def test_rope_that_depends_on_the_batch_is_refused(rope_type: str, by_layer_type: bool) -> None:
    model = hf_model()
    rope = {**model.config.rope_parameters, "rope_type": rope_type}
    model.config.rope_parameters = {"full_attention": rope} if by_layer_type else rope
    with pytest.raises(CheckpointError, match=rope_type):
        TargetModel(model)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("doge", "DogeAttention"),  # hands attention a mask with learnt biases in it
        ("stablelm", "StableLmAttention"),  # does not pass our arguments on
        ("gpt2", "final `norm`"),
    ],
)
def test_families_that_pages_cannot_serve_are_refused_when_made(family: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        TargetModel(hf_model(family))


def test_attention_outside_the_interface_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with attention of its own would run, and mix up the sequences of a batch."""
    model = hf_model()
    own = model.model.layers[1].self_attn
    monkeypatch.setattr(own, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(CheckpointError, match="attention interface"):
        TargetModel(model)


def test_layers_without_pages_are_refused() -> None:
    model = hf_model()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(CheckpointError, match="linear_attention"):
        TargetModel(model)


@pytest.mark.parametrize("layer", [-1, 2, 3])
def test_the_last_layer_is_not_tapped(layer: int) -> None:
    with pytest.raises(CheckpointError, match=f"layer {layer}"):
        TargetModel(hf_model(), (layer,))


def test_a_target_that_is_not_there_is_refused(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot load the target"):
        TargetModel.load(tmp_path / "nothing")
