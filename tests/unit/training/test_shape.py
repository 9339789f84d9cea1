"""A drafter's shape follows from its target's configuration, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import KINDS
from helpers.tiny import hf_model
from helpers.tokenizer import byte_level

from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.target import TargetModel
from dspark.training.shape import drafter_config

_GEMMA4 = {"final_logit_softcapping": 2.0, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind.model_type: (kind.model_type, kind.target) for kind in KINDS.values()},
    "gemma2, capped": ("gemma2", {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma4, keys for values": (
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4, of one width": ("gemma4_text", {**_GEMMA4, "global_head_dim": 8}),
}


def shape_for(folder: Path, **settings: Any) -> DrafterConfig:
    wanted: dict[str, Any] = {
        "block_size": 4,
        "layers": 2,
        "intermediate": 0,
        "kv_heads": 1,
        "head": "vanilla",
        "markov_rank": 8,
        "sample_from_anchor": True,
        "draft_vocab": 24,
        "context_window": 0,
        "target_layers": "0,1",
        "mask_token": "a",
    }
    return drafter_config(str(folder), byte_level(), **wanted, **settings)


@pytest.mark.parametrize("name", TARGETS)
def test_layers_are_as_the_targets_full_ones(name: str, tmp_path: Path) -> None:
    family, settings = TARGETS[name]
    model = hf_model(family, vocab=512, **settings)
    model.save_pretrained(tmp_path)
    config = shape_for(tmp_path)
    target = TargetModel.load(tmp_path, dtype=torch.float32)
    drafter = DSparkDrafter(config, target.embed_weight, target.lm_head_weight, torch.arange(24))
    theirs, ours = model.get_decoder().layers[-1], drafter.layers[0]
    assert type(ours) is type(theirs)
    attention = ours.self_attn
    assert attention.head_dim == theirs.self_attn.head_dim
    assert attention.scaling == theirs.self_attn.scaling
    assert attention.k_proj.out_features == attention.head_dim, "one KV head was asked for"
    assert (attention.v_proj is None) == (theirs.self_attn.v_proj is None)
    caps = [getattr(a, "attn_logit_softcapping", None) for a in (attention, theirs.self_attn)]
    assert caps[0] == caps[1]
    assert drafter.softcap == getattr(model.config, "final_logit_softcapping", None)
    # Mistral's own window is of every layer, and far beyond what a context window lets through.
    assert set(drafter.windows) == ({4096} if family == "mistral" else {None})
