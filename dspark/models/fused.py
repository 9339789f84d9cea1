"""The layer loop of Llama-shaped models on the C++ operators: a third of the step of the modules.

    x += Δ;  h = norm(x);  qkv = h W_qkv;  rotate, write;  Δ = attention(qkv) W_o
    x += Δ;  h = norm(x);  Δ = (silu(h W_gate) ⊙ h W_up) W_down

What the modules spend on fifteen small calls a layer is five here, and matrices that read the same
rows are one. Every row of every call depends on its own inputs alone, so what a row says does not
change with the rows beside it: in bf16, too, a token is the same decoded alone or verified.

Symbols as in dspark.models.target; H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dspark.kernels.attention_plan import AttentionPlan
from dspark.kernels.cpu import operators
from dspark.kernels.dispatch import has_cpu_operators
from dspark.models.kv_cache import PagedKVCache
from dspark.models.packed_linear import PackedLinear, can_pack

_FAMILIES = {"llama", "qwen2", "qwen3", "mistral"}


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: PackedLinear
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    out: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    window: int | None


class FusedDecoder:
    """A decoder's layers and final norm, in bf16 on the CPU."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        decoder = model.get_decoder()
        attention = decoder.layers[0].self_attn
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._width: int = attention.head_dim
        self._scale: float = attention.scaling
        self._eps: float = config.rms_norm_eps
        self._final_norm: torch.Tensor = decoder.norm.weight
        self._frequencies = decoder.rotary_emb.inv_freq.float()
        self._rope_scale: float = decoder.rotary_emb.attention_scaling
        self._layers = [_layer(layer, config, i) for i, layer in enumerate(decoder.layers)]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this loop computes what the model's own modules do."""
        config = model.config.get_text_config()
        if config.model_type not in _FAMILIES or not can_pack(model.dtype, model.device):
            return False
        attention = model.get_decoder().layers[0].self_attn
        width = attention.head_dim
        multiples = (config.hidden_size, config.intermediate_size)
        return (
            has_cpu_operators(model.dtype, model.device, width)
            and config.hidden_act == "silu"
            and all(size % operators.LANES == 0 for size in multiples)
            and len(model.get_decoder().rotary_emb.inv_freq) == width // 2
        )

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        positions: torch.Tensor,  # [T]
        plan: AttentionPlan,
        kv: PagedKVCache,
        logit_rows: torch.Tensor,  # [N]
        tap_layer_ids: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normed hidden states [N, d] of the logit rows, and taps [T, m·d] side by side."""
        x = F.embedding(token_ids, self._embedding)
        angles = positions.float()[:, None] * self._frequencies
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        taps: dict[int, torch.Tensor] = {}
        delta: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            h = operators.add_rms_norm(x, delta, layer.input_norm, self._eps)
            if i - 1 in tap_layer_ids:
                taps[i - 1] = x.clone()  # the layer below has only now been added in
            qkv = layer.qkv(h)
            keys, values = kv.pages(i, self._kv_heads, self._width)
            operators.rotate_write(
                qkv, cos, sin, layer.head_norms, self._eps, keys, values, plan.slots,
                self._heads, self._width,
            )  # fmt: skip
            mixed = operators.attention(
                qkv, keys, values, plan, self._heads, self._width,
                scale=self._scale, window=layer.window,
            )  # fmt: skip
            h = operators.add_rms_norm(x, layer.out(mixed), layer.mlp_norm, self._eps)
            delta = layer.down(operators.silu_mul(layer.gate_up(h)))
        assert delta is not None
        hidden = operators.add_rms_norm(
            x[logit_rows], delta[logit_rows], self._final_norm, self._eps
        )
        if not tap_layer_ids:
            return hidden, None
        return hidden, torch.cat([taps[i] for i in tap_layer_ids], dim=-1)


def _layer(layer: Any, config: Any, index: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=norms,
        out=PackedLinear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_side_by_side(mlp.gate_proj, mlp.up_proj),
        down=PackedLinear(mlp.down_proj),
        window=_window(config, index),
    )


def _window(config: Any, index: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _side_by_side(*linears: nn.Linear) -> PackedLinear:
    """One linear layer whose output is that of several, one after the other."""
    joined = nn.Linear(
        linears[0].in_features, sum(one.out_features for one in linears), bias=False, device="meta"
    )
    joined.weight = nn.Parameter(torch.cat([one.weight for one in linears]), requires_grad=False)
    if linears[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([one.bias for one in linears]), requires_grad=False)
    return PackedLinear(joined)
