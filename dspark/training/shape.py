"""Choosing a drafter's shape for a target."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from dspark.errors import CheckpointError, ConfigError
from dspark.models.drafter import DrafterConfig

_DEFAULT_TAPS = 3
# What the backbone takes over from the target's configuration, where the target has it.
_INHERITED = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_k_eq_v",
)


def drafter_config(
    target: str,
    tokenizer: Any,
    *,
    block_size: int,
    layers: int,
    intermediate: int,
    kv_heads: int,
    head: str,
    markov_rank: int,
    sample_from_anchor: bool,
    draft_vocab: int,
    context_window: int,
    target_layers: str,
    mask_token: str,
) -> DrafterConfig:
    """A drafter in the target's own family; ConfigError or CheckpointError if it cannot be."""
    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration of {target!r}: {error}") from error
    # Not by attribute: where a target's layers differ, those of one alone raise errors.
    settings = config.to_dict()
    backbone = {key: settings[key] for key in _INHERITED if key in settings}
    backbone["num_hidden_layers"] = layers
    backbone["intermediate_size"] = intermediate or config.intermediate_size
    backbone["num_key_value_heads"] = kv_heads or config.num_attention_heads
    if settings.get("layer_types"):
        backbone["layer_types"] = ["full_attention"] * layers  # context_window bounds them all
    if "attention_k_eq_v" in settings:
        backbone |= _like_full_layers(config, backbone["num_key_value_heads"])
    return DrafterConfig(
        block_size=block_size,
        target_layer_ids=_taps(target_layers, config.num_hidden_layers),
        mask_token_id=_mask_token_id(tokenizer, mask_token),
        markov_rank=markov_rank,
        target_hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=min(draft_vocab, config.vocab_size),
        context_window=context_window,
        backbone=backbone,
        markov_head_type=head,
        confidence_head_with_markov=markov_rank > 0,
        sample_from_anchor=sample_from_anchor,
    )


def _like_full_layers(config: Any, kv_heads: int) -> dict[str, Any]:
    """What a Gemma4 drafter's layers are besides: like the target's full ones, and dense."""
    full = config.per_layer_config["full_attention"]
    return {
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": kv_heads,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
    }


def _taps(wanted: str, layers: int) -> tuple[int, ...]:
    if wanted:
        try:
            return tuple(int(part) for part in wanted.split(","))
        except ValueError as error:
            raise ConfigError(
                f"--target-layers wants numbers, such as 8,18,28; got {wanted!r}"
            ) from error
    last = layers - 2  # the last layer's output is what the LM head reads: no news there
    spread = {round(last * (i + 1) / _DEFAULT_TAPS) for i in range(_DEFAULT_TAPS)}
    return tuple(sorted(i for i in spread if i >= 0)) or (0,)


def _mask_token_id(tokenizer: Any, wanted: str) -> int:
    """A token that text does not hold: the one named, or the last special token without a job."""
    if wanted:
        found = tokenizer.convert_tokens_to_ids(wanted)
        if found is None or found == tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer has no token {wanted!r}")
        return int(found)
    busy = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    idle = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    idle = sorted(set(idle) - busy)
    if not idle:
        raise ConfigError("the tokenizer has no idle special token: name one with --mask-token")
    return int(idle[-1])
