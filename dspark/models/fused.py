"""The layers of Llama-shaped models on the C++ operators: a third of the step of the modules.

    x += Δ;  h = norm(x);  qkv = h W_qkv;  rotate, write;  Δ = attention(qkv) W_o
    x += Δ;  h = norm(x);  Δ = (silu(h W_gate) ⊙ h W_up) W_down

Matrices that read the same rows are one, and Python is left out between layers. Every row of every
call depends on its own inputs alone, so what a row says does not change with the rows beside it: in
bf16, too, a token is the same decoded alone or verified.

Symbols as in dspark.models.target; H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dspark.kernels.attention_plan import AttentionPlan
from dspark.kernels.cpu import operators
from dspark.kernels.dispatch import has_cpu_operators
from dspark.models.families import layer_window
from dspark.models.kv_cache import PagedKVCache
from dspark.models.packed_linear import can_pack

FAMILIES = {"llama", "qwen2", "qwen3", "mistral"}  # of this shape


class FusedLayers:
    """Decoder layers of one shape, in bf16 on the CPU."""

    def __init__(self, config: Any, layers: Any, rotary: Any) -> None:
        attention = layers[0].self_attn
        self._frequencies = rotary.inv_freq.float()
        self._rope_scale: float = rotary.attention_scaling
        self.shape = operators.DecoderShape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=attention.head_dim,
            eps=config.rms_norm_eps,
            scale=attention.scaling,
        )
        self._count = len(layers)
        self._layers = operators.DecoderLayers(
            self.shape,
            [_tensors(layer) for layer in layers],
            [layer_window(config, i) for i in range(self._count)],
        )

    def __len__(self) -> int:
        return self._count

    @staticmethod
    def fits(
        config: Any, layers: Any, rotary: Any, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether this loop computes what the layers' own modules do."""
        if config.model_type not in FAMILIES or not can_pack(dtype, device):
            return False
        width = layers[0].self_attn.head_dim
        multiples = (config.hidden_size, config.intermediate_size)
        return (
            has_cpu_operators(dtype, device, width)
            and config.hidden_act == "silu"
            and all(size % operators.LANES == 0 for size in multiples)
            and len(rotary.inv_freq) == width // 2
        )

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, D/2] of positions [T]."""
        angles = positions.float()[:, None] * self._frequencies
        return angles.cos() * self._rope_scale, angles.sin() * self._rope_scale

    def run(
        self,
        first: int,
        last: int,
        x: torch.Tensor,  # [T, d] the residual, updated in place
        delta: torch.Tensor,  # [T, d] what is yet to be added to it, before and after
        cos: torch.Tensor,  # [T, D/2]
        sin: torch.Tensor,  # [T, D/2]
        plan: AttentionPlan,
        kv: PagedKVCache,
        *,
        fresh: bool,  # nothing is yet to be added
    ) -> None:
        """Run layers `first` to `last` - 1."""
        shape = self.shape
        pages = [kv.pages(i, shape.kv_heads, shape.width) for i in range(first, last)]
        self._layers.run(first, last, x, delta, cos, sin, plan, pages, fresh=fresh)


class FusedDecoder:
    """A decoder's layers and final norm."""

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._final_norm: torch.Tensor = decoder.norm.weight
        self._layers = FusedLayers(
            model.config.get_text_config(), decoder.layers, decoder.rotary_emb
        )

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this loop computes what the model's own modules do."""
        config, decoder = model.config.get_text_config(), model.get_decoder()
        # Other families' decoders need not even have the parts that are looked at below.
        return config.model_type in FAMILIES and FusedLayers.fits(
            config, decoder.layers, decoder.rotary_emb, model.dtype, model.device
        )

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        plan: AttentionPlan,
        kv: PagedKVCache,
        logit_rows: torch.Tensor,  # [N]
        tap_layer_ids: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normed hidden states [N, d] of the logit rows, and taps [T, m·d] side by side."""
        x = F.embedding(token_ids, self._embedding)
        delta = torch.empty_like(x)
        cos, sin = self._layers.rotary(plan.positions)
        taps: dict[int, torch.Tensor] = {}
        first, count = 0, len(self._layers)
        for end in sorted({*(i + 1 for i in tap_layer_ids), count}):
            fresh = first == 0 or first - 1 in taps
            self._layers.run(first, end, x, delta, cos, sin, plan, kv, fresh=fresh)
            if end - 1 in tap_layer_ids:
                x += delta
                taps[end - 1] = x.clone()
            first = end
        eps = self._layers.shape.eps
        if len(logit_rows) < len(x):
            x, delta = x[logit_rows], delta[logit_rows]
        hidden = operators.add_rms_norm(x, delta, self._final_norm, eps)
        if not tap_layer_ids:
            return hidden, None
        return hidden, torch.cat([taps[i] for i in tap_layer_ids], dim=-1)


def _tensors(layer: Any) -> dict[str, torch.Tensor | None]:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "out": (attention.o_proj,),
        "gate_up": (mlp.gate_proj, mlp.up_proj),
        "down": (mlp.down_proj,),
    }
    tensors: dict[str, torch.Tensor | None] = {
        "input_norm": layer.input_layernorm.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
        "q_norm": getattr(getattr(attention, "q_norm", None), "weight", None),
        "k_norm": getattr(getattr(attention, "k_norm", None), "weight", None),
    }
    for name, parts in linears.items():
        biases = [part.bias for part in parts if part.bias is not None]
        tensors[name] = operators.pack_linear(torch.cat([part.weight for part in parts]))
        tensors[f"{name}_bias"] = operators.pack_bias(torch.cat(biases)) if biases else None
    return tensors
