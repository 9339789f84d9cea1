"""Checkpoints of speculators are the same drafters as in DeepSpec's layout, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import drafter_of
from helpers.tiny import tiny_target
from safetensors.torch import load_file, save_file

from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.errors import CheckpointError
from dspark.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_drafter,
    read_config,
    save_drafter,
)
from dspark.models.drafter import DSparkDrafter
from dspark.types import BlockProposal, DraftWork, Fence, SamplingParams

LAYERS: dict[str, Any] = {  # of transformers' Qwen3Config, but for its defaults
    "model_type": "qwen3",
    "head_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "vocab_size": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {},
    "reduced": {"draft_vocab": 24},
    "gated, reduced": {"head": "gated", "draft_vocab": 24},
    "rnn": {"head": "rnn"},
    "filled in": {"from_anchor": False, "draft_vocab": 24},
    "no confidence": {"confidence": False},
    "dflash": {"rank": 0, "confidence": False, "from_anchor": False, "draft_vocab": 24},
}


def make(folder: Path, drafter: DSparkDrafter, family: str = "qwen3", **fields: Any) -> None:
    """The drafter as speculators would save it; fields of None are left out."""
    shape = drafter.config
    reduced = shape.draft_vocab_size < shape.vocab_size
    tensors = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    if reduced:
        marks = torch.zeros(shape.vocab_size, dtype=torch.bool)
        marks[drafter.draft_token_ids] = True
        tensors |= {
            "d2t": drafter.draft_token_ids - torch.arange(shape.draft_vocab_size),
            "t2d": marks,
            "lm_head.weight": drafter.head_weight.clone(),
        }
    config: dict[str, Any] = {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark" if shape.markov_rank else "dflash",
        "speculators_config": {"verifier": {"name_or_path": "somewhere/else"}},
        "transformer_layer_config": LAYERS | {"model_type": family},
        "aux_hidden_state_layer_ids": [i + 1 for i in shape.target_layer_ids],
        "block_size": shape.rows(shape.block_size),
        "draft_vocab_size": shape.draft_vocab_size,
        "mask_token_id": shape.mask_token_id,
        "target_hidden_size": None,
        "num_anchors": 256,
        "sliding_window_non_causal": False,
        "sample_from_anchor": shape.sample_from_anchor,
    }
    if shape.markov_rank:
        config |= {
            "markov_rank": shape.markov_rank,
            "markov_head_type": shape.markov_head_type,
            "enable_confidence_head": shape.enable_confidence_head,
            "confidence_head_with_markov": shape.confidence_head_with_markov,
        }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE)
    kept = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(kept))


def block(drafter: DSparkDrafter) -> BlockProposal:
    engine = DraftEngine(DSparkBlocks(drafter), num_pages=8)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 32, generator=generator)
    sampling = SamplingParams(temperature=1.0, seed=5)
    proposals, _ = engine.run([DraftWork(Fence("s", 0, 0, 41), 0, features, 7, 4, sampling)])
    return proposals[0]


def same(folder: Path, drafter: DSparkDrafter) -> DSparkDrafter:
    """Compares the checkpoint in `folder` with the drafter in DeepSpec's layout."""
    target = tiny_target("qwen3")
    own = folder.parent / "own"
    save_drafter(drafter, own, torch.float32)
    got, want = load_drafter(folder, target), load_drafter(own, target)
    for field in ("target_layer_ids", "block_size", "sample_from_anchor", "draft_vocab_size"):
        assert getattr(got.config, field) == getattr(want.config, field), field
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.named_buffers():
        assert torch.equal(got.get_buffer(name), tensor), name
    for name, tensor in want.named_parameters():
        assert torch.equal(got.get_parameter(name), tensor), name
    first, second = (block(d.for_inference(torch.float32)) for d in (got, want))
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.confidences.tolist() == second.confidences.tolist()
    assert first.candidate_probs is not None
    assert second.candidate_probs is not None
    assert first.candidate_probs.tolist() == second.candidate_probs.tolist()
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_read_to_the_bit(kind: str, tmp_path: Path) -> None:
    drafter = drafter_of("qwen3", **KINDS[kind])
    make(tmp_path / "theirs", drafter)
    got = same(tmp_path / "theirs", drafter)
    save_drafter(got, tmp_path / "again", torch.float32)
    assert read_config(tmp_path / "again") == got.config


def test_layers_are_qwen3s_whatever_sizes_them(tmp_path: Path) -> None:
    drafter = drafter_of("qwen3", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    layers = LAYERS | {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}}
    make(tmp_path / "theirs", drafter, transformer_layer_config=layers)
    same(tmp_path / "theirs", drafter)


def test_layers_slide(tmp_path: Path) -> None:
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
    drafter = drafter_of("qwen3, sliding")
    layers = LAYERS | sliding | {"use_sliding_window": True}
    fields: dict[str, Any] = {"transformer_layer_config": layers}
    make(tmp_path / "theirs", drafter, **fields, sliding_window_non_causal=True)
    assert same(tmp_path / "theirs", drafter).windows == (20, None)
    make(tmp_path / "causal", drafter, **fields)
    with pytest.raises(CheckpointError, match="sliding_window_non_causal"):
        read_config(tmp_path / "causal")


def test_what_training_left_behind_is_not_needed(tmp_path: Path) -> None:
    drafter = drafter_of("qwen3", draft_vocab=24)
    make(tmp_path / "theirs", drafter)
    path = tmp_path / "theirs" / WEIGHTS_FILE
    left = {"verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(24, 32)}
    save_file({**load_file(path), **left}, path)
    same(tmp_path / "theirs", drafter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speculators_model_type", "eagle3"),
        ("transformer_layer_config", None),
        ("transformer_layer_config", [1]),
        ("transformer_layer_config", LAYERS | {"model_type": "gemma3_text"}),
        ("transformer_layer_config", LAYERS | {"model_type": "no_such_model"}),
        ("transformer_layer_config", LAYERS | {"num_attention_heads": "four"}),
        ("aux_hidden_state_layer_ids", None),
        ("aux_hidden_state_layer_ids", [0, 1]),
        ("aux_hidden_state_layer_ids", [2, 1]),
        ("aux_hidden_state_layer_ids", "12"),
        ("block_size", None),
        ("block_size", 1.5),
        ("mask_token_id", None),
        ("mask_token_id", 32),
        ("draft_vocab_size", None),
        ("draft_vocab_size", 33),
        ("markov_rank", None),
        ("markov_head_type", "marble"),
        ("sample_from_anchor", "yes"),
        ("projector_type", "domino"),
        ("shift_label", True),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    """None: the field is missing."""
    make(tmp_path / "theirs", drafter_of("qwen3", draft_vocab=24), **{field: value})
    with pytest.raises(CheckpointError, match=field):
        load_drafter(tmp_path / "theirs", tiny_target("qwen3"))


def test_a_state_that_begins_at_the_anchors_row_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "theirs", drafter_of("qwen3", head="rnn", from_anchor=False))
    with pytest.raises(CheckpointError, match=r"rnn without sample_from_anchor"):
        read_config(tmp_path / "theirs")


def test_taps_past_the_target_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "theirs", drafter_of("qwen3"), aux_hidden_state_layer_ids=[1, 4])
    with pytest.raises(CheckpointError, match=r"layers \[0, 3\].*has 3"):
        load_drafter(tmp_path / "theirs", tiny_target("qwen3"))


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    make(tmp_path / "theirs", drafter_of("qwen3", draft_vocab=24))
    path, target = tmp_path / "theirs" / WEIGHTS_FILE, tiny_target("qwen3")
    whole = load_file(path)

    def refused(match: str, **tensors: torch.Tensor | None) -> None:
        kept = {name: tensor for name, tensor in (whole | tensors).items() if tensor is not None}
        save_file(kept, path)
        with pytest.raises(CheckpointError, match=match):
            load_drafter(tmp_path / "theirs", target)

    offsets, marks = whole["d2t"], whole["t2d"]
    falling, far = offsets.clone(), offsets.clone()
    falling[3] -= 40
    far[-1] = 32
    refused("no d2t", d2t=None)
    refused("no d2t", d2t=None, t2d=None)
    refused("d2t must be 24 whole numbers", d2t=offsets[1:])
    refused("d2t must be 24 whole numbers", d2t=offsets.float())
    refused("d2t must lead to rising", d2t=falling)
    refused("d2t must lead to rising", d2t=far)
    refused("t2d does not mark", t2d=~marks)
    refused("t2d does not mark", t2d=marks[1:])
    refused(r"lm_head\.weight has shape \(23, 32\)", **{"lm_head.weight": torch.zeros(23, 32)})
    refused(r"missing.*norm\.weight", **{"norm.weight": None})
    refused("unexpected.*surprise", surprise=torch.zeros(1))
    save_file({name: t for name, t in whole.items() if name != "t2d"}, path)
    load_drafter(tmp_path / "theirs", target)
