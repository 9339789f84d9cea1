"""Tiny drafters of every family, in the layouts that their checkpoints have."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from helpers.tiny import tiny_drafter, tiny_target

from dspark.models.drafter import DSparkDrafter
from dspark.models.target import TargetModel

WINDOW = 20
_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = {"layer_types": _TYPES, "sliding_window": WINDOW}
_GEMMA4 = {
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 2.0,
}


@dataclass(frozen=True)
class Kind:
    """Settings of a drafter's layers, and of its target's where they are needed."""

    model_type: str
    drafter: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
KINDS: dict[str, Kind] = {
    **{name: Kind(name) for name in (*LLAMA_LIKE, "gemma")},
    **{f"{name}, sliding": Kind(name, _SLIDING) for name in ("llama", "mistral")},
    **{
        f"{name}, sliding": Kind(name, {**_SLIDING, "use_sliding_window": True})
        for name in ("qwen2", "qwen3")
    },
    "gemma2": Kind(
        "gemma2",
        {
            **_SLIDING,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": Kind("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 16}),
    # As DeepSpec lays it out: all layers like the target's full ones, keys for values.
    "gemma4": Kind(
        "gemma4_text",
        {
            **_GEMMA4,
            "layer_types": ["full_attention"] * 2,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 18,  # the target's, copied along
        },
        _GEMMA4,
    ),
    "gemma4, mixed": Kind("gemma4_text", {**_GEMMA4, **_SLIDING}, _GEMMA4),  # layers of two widths
}


@cache
def target_of(kind: str) -> TargetModel:
    """A tiny target of the family, the same at every call."""
    return tiny_target(KINDS[kind].model_type, **KINDS[kind].target)


def drafter_of(kind: str, block_size: int = 4, **settings: Any) -> DSparkDrafter:
    """Random in every weight, those that start as ones or zeros as well."""
    drafter = tiny_drafter(target_of(kind), block_size, **KINDS[kind].drafter, **settings)
    generator = torch.Generator().manual_seed(9)
    for name, tensor in drafter.state_dict().items():
        if "norm" in name or "scalar" in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return drafter
