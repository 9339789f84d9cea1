"""Where model families differ in what lies around a drafter's layers.

The layers themselves are transformers' own, by configuration, and know their norms, MLPs, scales
and caps. A drafter brings in what a whole model would: embedded tokens, positions, and the keys and
values of its context, which have to go the same way as those of its block.

Shape symbols as in dspark.models.drafter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dspark.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """A family, as far as its configuration does not tell."""

    name: str  # in `architectures`, as DeepSpec writes it
    scaled_embedding: bool = False  # tokens are embedded times √d
    rotary_by_type: bool = False  # full and sliding layers turn at their own frequencies
    norm_offset: float = 0.0  # norms multiply by their weight plus this


_GEMMA4 = Family("Gemma4", scaled_embedding=True, rotary_by_type=True)
_FAMILIES = {
    "gemma": Family("Gemma", scaled_embedding=True, norm_offset=1.0),
    "gemma2": Family("Gemma2", scaled_embedding=True, norm_offset=1.0),
    "gemma3_text": Family("Gemma3", scaled_embedding=True, rotary_by_type=True, norm_offset=1.0),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ONLY_OF_TARGETS = ("hidden_size_per_layer_input", "enable_moe_block")  # Gemma4's
# Gemma4's as well, and copied into its drafters' configurations, whose layers share nothing.
_DROPPED = ("num_kv_shared_layers",)


def family(model_type: str) -> Family:
    """The family of a text model; one that is not known differs in nothing."""
    return _FAMILIES.get(model_type) or Family(model_type.title().replace("_", ""))


def own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a drafter's layers without those that only a whole target has use for.

    CheckpointError if they name layers that a drafter cannot have.
    """
    types = settings.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in _LAYER_TYPES for kind in types)
        if not known or len(types) != settings.get("num_hidden_layers", len(types)):
            raise CheckpointError(
                f"layer_types must name one of {_LAYER_TYPES} for each of "
                f"num_hidden_layers; got {types!r}"
            )
    return {name: value for name, value in settings.items() if name not in _DROPPED}


def check_layers(config: Any, settings: dict[str, Any]) -> None:
    """CheckpointError, naming the field, if layers cannot run as a drafter's.

    `config` is transformers' configuration of them, made from `settings`.
    """
    for name in _ONLY_OF_TARGETS:
        if getattr(config, name, 0):
            raise CheckpointError(
                f"{name} must be 0 in a drafter, whose layers are dense and see the target through "
                f"its features alone; got {getattr(config, name)}"
            )
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None and not softcap > 0:
        raise CheckpointError(f"final_logit_softcapping must be positive or null; got {softcap}")
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    if types != (settings.get("layer_types") or types):
        raise CheckpointError(
            f"layer_types {settings['layer_types']} cannot be had in {config.model_type}, which "
            f"makes them {types}"
        )
    if "sliding_attention" in types and not getattr(config, "sliding_window", None):
        raise CheckpointError(
            "layer_types names sliding_attention layers, but there is no sliding_window "
            "(use_sliding_window may have to be true)"
        )


def layer_window(config: Any, index: int) -> int | None:
    """How many positions back a layer sees, its own included; None: all."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def rotary_by_layer(
    config: Any,
    rotary: Any,
    x: torch.Tensor,  # [S, L, d] of the type and device that are wanted
    positions: torch.Tensor,  # [S, L]
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # by layer, [S, L, D] each
    """Cosines and sines of every layer."""
    if not family(config.model_type).rotary_by_type:
        return [rotary(x, positions)] * config.num_hidden_layers
    made = {kind: rotary(x, positions, kind) for kind in set(config.layer_types)}
    return [made[kind] for kind in config.layer_types]


def context_kv(
    attention: Any,
    features: torch.Tensor,  # [S, L, d]
    cos: torch.Tensor,  # [S, L, D]
    sin: torch.Tensor,  # [S, L, D]
) -> tuple[torch.Tensor, torch.Tensor]:  # [S, G, L, D] each
    """Keys and values of context features in one layer, as it makes those of its block."""
    heads = (*features.shape[:2], -1, attention.head_dim)
    keys = attention.k_proj(features).view(heads)
    # Gemma4 may have one projection for both; keys and values part at their norms.
    values = keys if attention.v_proj is None else attention.v_proj(features).view(heads)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    if hasattr(attention, "v_norm"):
        values = attention.v_norm(values)
    return _rotate(keys.transpose(1, 2), cos, sin), values.transpose(1, 2)


def _rotate(
    x: torch.Tensor,  # [S, G, L, D]
    cos: torch.Tensor,  # [S, L, D]
    sin: torch.Tensor,  # [S, L, D]
) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
