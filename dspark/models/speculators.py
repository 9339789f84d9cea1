"""Checkpoints of vllm-project/speculators (`dspark` and `dflash`), turned into DeepSpec's layout.

    layers               Qwen3's, sized by transformer_layer_config, whatever family that names
    target_layer_ids     aux_hidden_state_layer_ids - 1: theirs count hidden states, of which the
                         first is the embedding
    block_size           theirs is rows; without sample_from_anchor, one of them predicts nothing
    draft_token_ids[i]   i + d2t[i];  t2d marks the same tokens in the target's vocabulary
    lm_head              holds the rows of the draft vocabulary alone, where that is reduced

A sliding layer counts its window from each row here; its training there did from the anchor.
Facts from its src/speculators/models/{dspark,dflash} and from how vLLM reads their configurations.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from dspark.errors import CheckpointError
from dspark.models.families import family

_TYPE = "speculators_model_type"
_LAYERS = "transformer_layer_config"
_TAPS = "aux_hidden_state_layer_ids"
_KINDS = ("dspark", "dflash")
_LAYER_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "max_position_embeddings",
    "rope_parameters",
    "layer_types",
    "sliding_window",
)
_SAME = ("mask_token_id", "enable_confidence_head", "confidence_head_with_markov")
_OF_TRAINING = ("verifier_norm.weight", "verifier_lm_head.weight")  # the target's, not drafted with


def is_speculators(raw: dict[str, Any]) -> bool:
    """Whether a configuration is of this format."""
    return _TYPE in raw


def deepspec_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The same drafter's configuration in DeepSpec's layout.

    CheckpointError, naming the field, for what is missing or cannot be done here.
    """
    kind = raw[_TYPE]
    if kind not in _KINDS:
        raise CheckpointError(f"{_TYPE} must be one of {_KINDS}; got {kind!r}")
    wanted = (_LAYERS, _TAPS, "block_size", "mask_token_id", "draft_vocab_size")
    missing = [name for name in wanted if raw.get(name) is None]
    if kind == "dspark" and "markov_rank" not in raw:
        missing.append("markov_rank")
    if missing:
        raise CheckpointError(f"this speculators configuration has no {missing}")
    layers = _layers(raw[_LAYERS])
    from_anchor = raw.get("sample_from_anchor", kind == "dspark")
    _refuse_other_drafts(raw, layers, from_anchor)
    block_size = raw["block_size"]
    if type(block_size) is int and from_anchor is False:
        block_size -= 1
    out = {
        **layers,
        **{name: raw[name] for name in _SAME if name in raw},
        "target_layer_ids": _target_layers(raw[_TAPS]),
        "target_hidden_size": raw.get("target_hidden_size") or layers["hidden_size"],
        "draft_vocab_size": raw["draft_vocab_size"],
        "block_size": block_size,
        "sample_from_anchor": from_anchor,
        "markov_rank": raw["markov_rank"] if kind == "dspark" else 0,
    }
    if kind == "dflash":
        return {**out, "enable_confidence_head": False, "confidence_head_with_markov": False}
    return {**out, "markov_head_type": raw.get("markov_head_type", "vanilla")}


def deepspec_tensors(
    tensors: dict[str, torch.Tensor], vocab_size: int, draft_vocab_size: int
) -> dict[str, torch.Tensor]:
    """The same drafter's tensors; CheckpointError, naming the tensor, if a map does not hold."""
    out = {name: tensor for name, tensor in tensors.items() if name not in _OF_TRAINING}
    offsets, marks = out.pop("d2t", None), out.pop("t2d", None)
    if offsets is None:
        if marks is not None or draft_vocab_size != vocab_size:
            raise CheckpointError(
                f"there is no d2t, which a draft vocabulary of {draft_vocab_size} of {vocab_size} "
                "tokens needs"
            )
        return out
    if offsets.shape != (draft_vocab_size,) or offsets.is_floating_point():
        raise CheckpointError(
            f"d2t must be {draft_vocab_size} whole numbers; it is {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    ids = torch.arange(draft_vocab_size) + offsets.long()
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or not bool((ids.diff() > 0).all()):
        raise CheckpointError(f"d2t must lead to rising token ids below {vocab_size}")
    if marks is not None:
        marked = torch.zeros(vocab_size, dtype=torch.bool)
        marked[ids] = True
        if marks.shape != marked.shape or not torch.equal(marks.bool(), marked):
            raise CheckpointError("t2d does not mark the tokens that d2t leads to")
    return {**out, "draft_token_ids": ids}


def _layers(settings: Any) -> dict[str, Any]:
    """A Qwen3 configuration: speculators' layers are those, by any family's sizes."""
    if not isinstance(settings, dict):
        raise CheckpointError(f"{_LAYERS} must be an object; got {settings!r}")
    settings = dict(settings)
    model_type = settings.pop("model_type", "qwen3")
    if family(str(model_type)).scaled_embedding:
        raise CheckpointError(
            f"{_LAYERS} of model_type {model_type!r} makes drafters that are part Qwen3's and part "
            "its own, which cannot be had here"
        )
    try:
        # What is not written there is that family's default.
        theirs = AutoConfig.for_model(model_type, **settings).to_dict()
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{_LAYERS} cannot be read: {error}") from error
    out = {name: theirs[name] for name in _LAYER_SETTINGS if theirs.get(name) is not None}
    rope = out.get("rope_parameters", {})
    out["rope_parameters"] = rope.get("sliding_attention", rope)
    out["use_sliding_window"] = "sliding_window" in out
    return {**out, "model_type": "qwen3", "vocab_size": theirs["vocab_size"]}


def _target_layers(ids: Any) -> list[int]:
    numbers = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
    if not numbers or min(ids) < 1 or ids != sorted(set(ids)):
        raise CheckpointError(
            f"{_TAPS} must be whole numbers that rise from 1 or later (0 is the embedding, which "
            f"is not tapped here); got {ids!r}"
        )
    return [i - 1 for i in ids]


def _refuse_other_drafts(raw: dict[str, Any], layers: dict[str, Any], from_anchor: Any) -> None:
    sliding = "sliding_attention" in layers.get("layer_types", ())
    if sliding and not raw.get("sliding_window_non_causal", False):
        raise CheckpointError(
            "sliding_window_non_causal is false: sliding layers whose rows see no later row of "
            "their block cannot be had here"
        )
    if raw.get("projector_type", "dflash") != "dflash":
        raise CheckpointError(f"projector_type must be dflash; got {raw['projector_type']!r}")
    if raw.get("shift_label"):
        raise CheckpointError(
            "shift_label must be false: sample_from_anchor says what rows predict"
        )
    if raw.get("markov_head_type") == "rnn" and from_anchor is False:
        raise CheckpointError(
            "markov_head_type rnn without sample_from_anchor begins its state at the anchor's own "
            "row, which predicts nothing; it cannot be had here"
        )
