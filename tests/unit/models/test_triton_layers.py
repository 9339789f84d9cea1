"""Targets on Triton's kernels say what the modules say, and are what the engine runs on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.steps import STEPS, Cache
from helpers.tiny import TAPS, hf_model

from dspark.errors import ConfigError
from dspark.kernels.dispatch import RowStore, TritonStore
from dspark.models.target import TargetModel

pytest.importorskip("triton")
from dspark.kernels.triton.launch import launches
from dspark.kernels.triton.linear import narrow_pays

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases
    "qwen3": {},  # norms of queries and keys
    "mistral": {"sliding_window": 12},
}


def target_on(
    kernels: str, monkeypatch: pytest.MonkeyPatch, family: str, *, fused: bool, padded: bool
) -> TargetModel:
    monkeypatch.setenv("DSPARK_KERNELS", kernels)
    model = hf_model(family, vocab=64, **FAMILIES.get(family, {}))
    return TargetModel(model, TAPS, fused=fused, padded=padded)


@pytest.mark.parametrize(
    ("family", "padded"), [("llama", False), ("qwen2", True), ("qwen3", True), ("mistral", False)]
)
def test_the_loop_says_what_the_modules_say(
    family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = Cache(), Cache()
    plain = target_on("reference", monkeypatch, family, fused=False, padded=False)
    wants = [a.step(plain, rows) for rows in STEPS]
    ours = target_on("triton", monkeypatch, family, fused=True, padded=padded)
    assert ours.fused
    launches.clear()
    for rows, want in zip(STEPS, wants, strict=True):
        got = b.step(ours, rows)
        # fp32; sums in other orders
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.taps, want.taps, atol=1e-4, rtol=1e-4)
    layers = ours.num_layers
    assert launches["attend_tiles"] >= len(STEPS) * layers
    assert launches["rotate_write_kernel"] == len(STEPS) * layers
    assert launches["add_rms_norm_kernel"] == len(STEPS) * (2 * layers + 1)
    assert bool(launches["narrow_kernel"]) == narrow_pays(ours.device, ours.dtype)
    assert type(a.kv.layer(0)) is RowStore
    assert type(b.kv.layer(0)) is TritonStore


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_modules_of_other_families_attend_with_the_kernels(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra: dict[str, dict[str, Any]] = {
        "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 2.0},
        "gpt_oss": {"sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
    }
    found = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("DSPARK_KERNELS", kernels)
        launches.clear()
        target = TargetModel(hf_model(family, vocab=64, **extra[family]), TAPS, padded=True)
        cache = Cache()
        found.append(torch.cat([cache.step(target, rows).logits for rows in STEPS]))
        assert not target.fused
        assert bool(launches["attend_tiles"]) == (kernels == "triton")
        assert bool(launches["write_kernel"]) == (kernels == "triton")
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_modules_can_still_be_run_and_hold_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole sequences, as training takes them, go through the modules."""
    texts = [torch.arange(20) % 64, torch.arange(7)]
    rows = torch.arange(27)
    plain = target_on("reference", monkeypatch, "qwen2", fused=False, padded=False)
    want = plain.forward_whole(texts, rows)
    ours = target_on("triton", monkeypatch, "qwen2", fused=True, padded=False)
    got = ours.forward_whole(texts, rows)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    attention = ours.model.get_decoder().layers[0].self_attn
    storages = {
        p.untyped_storage().data_ptr() for p in (attention.q_proj.weight, attention.v_proj.weight)
    }
    assert len(storages) == 1


def alone_and_among_others(target: TargetModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one sequence's rows: decoded alone, and beside prompts and blocks of others."""
    alone, among = Cache(), Cache()
    found = []
    for cache, others in ((alone, (0, 0, 0)), (among, (40, 3, 1))):
        rows = [cache.step(target, (21, *others)).logits[:21]]
        rows += [cache.step(target, (1, *(min(n, 2) for n in others))).logits[:1] for _ in range(2)]
        found.append(torch.cat(rows))
    return found[0], found[1]


def test_batch_invariant_rows_say_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    model = hf_model("qwen2", vocab=64, hidden_size=96, intermediate_size=200)
    target = TargetModel(model, TAPS, padded=False, batch_invariant=True)
    alone, among = alone_and_among_others(target)
    assert torch.equal(alone, among)
    # ours of few rows do not depend on it, either
    monkeypatch.setattr("dspark.kernels.triton.linear.narrow_pays", lambda *_: False)
    usual = TargetModel(model, TAPS, padded=False)
    both = alone_and_among_others(usual)
    torch.testing.assert_close(both[0], alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(*both), "torch's products do depend on it, or this would show nothing"


def test_batch_invariance_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "reference")
    with pytest.raises(ConfigError, match=r"batch_invariant: a llama in torch\.float32 on cpu"):
        TargetModel(hf_model("llama"), batch_invariant=True)
