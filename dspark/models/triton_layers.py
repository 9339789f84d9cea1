"""The layers of Llama-shaped models on Triton's kernels: a third of the modules' launches.

    x += Δ;  h = norm(x);  qkv = h W_qkv;  rotate, write;  Δ = attention(qkv) W_o
    x += Δ;  h = norm(x);  Δ = (silu(h W_gate) ⊙ h W_up) W_down

Products are torch's, or ours for few rows where that pays. Matrices that read the same rows are
one; the modules' weights become views of it, so that the modules can still be run and nothing is
held twice.

Symbols as in dspark.models.target; H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dspark.errors import ConfigError
from dspark.kernels.attention_plan import AttentionPlan, RowPlan
from dspark.kernels.dispatch import TritonStore, serves_with_triton
from dspark.models.families import layer_window
from dspark.models.fused import FAMILIES
from dspark.models.kv_cache import PagedKVCache
from dspark.models.sharding import Shard

# Of rows [T, K], a weight [N, K] and a bias [N] or None.
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    norms: tuple[torch.Tensor, torch.Tensor] | None  # of queries and keys
    out: nn.Linear
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: nn.Linear
    window: int | None


class TritonLayers:
    """Decoder layers of one shape, over pages."""

    def __init__(
        self,
        config: Any,
        layers: Any,
        rotary: Any,
        *,
        linear: Linear = F.linear,
        one_size: bool = False,  # attention in tiles of one size, whatever rows there are
        shard: Shard | None = None,
    ) -> None:
        """Makes views of the weights of `layers`, which are the part `shard` of a target's."""
        attention = layers[0].self_attn
        self._linear, self._one_size, self._shard = linear, one_size, shard
        self._rotary = rotary
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._width: int = attention.head_dim
        self._scale: float = attention.scaling
        self._eps: float = config.rms_norm_eps
        self._layers = [_layer(layer, layer_window(config, i)) for i, layer in enumerate(layers)]

    @staticmethod
    def fits(
        config: Any, layers: Any, rotary: Any, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether this loop computes what the layers' own modules do."""
        if config.model_type not in FAMILIES or config.hidden_act != "silu":
            return False
        width: int = layers[0].self_attn.head_dim
        return len(rotary.inv_freq) == width // 2 and serves_with_triton(
            dtype, device, width, config.num_attention_heads, config.num_key_value_heads
        )

    def run(
        self,
        x: torch.Tensor,  # [T, d] the residual, updated in place
        plan: AttentionPlan | RowPlan,
        kv: PagedKVCache,
        tap_layer_ids: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[int, torch.Tensor]]:
        """The residual, what is yet to be added to it, and what the tapped layers put out."""
        from dspark.kernels.triton.attention import paged_attention
        from dspark.kernels.triton.cache_write import rotate_write
        from dspark.kernels.triton.rows import add_rms_norm, silu_mul

        linear, eps, mixed_width = self._linear, self._eps, self._heads * self._width
        cos, sin = self._turns(plan.placed.positions)
        slots = plan.placed.slots
        delta: torch.Tensor | None = None
        taps: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self._layers):
            h = add_rms_norm(x, delta, layer.input_norm, eps)
            qkv = linear(h, layer.qkv, layer.qkv_bias)
            store = self._store(kv, i, qkv)
            rotate_write(qkv, cos, sin, layer.norms, eps, store.keys, store.values, slots)
            query = qkv[:, :mixed_width].unflatten(1, (self._heads, self._width))
            mixed = paged_attention(
                query, store.keys, store.values, plan,
                scale=self._scale, window=layer.window, one_size=self._one_size,
            )  # fmt: skip
            delta = self._whole(linear(mixed.flatten(1), layer.out.weight, layer.out.bias))
            h = add_rms_norm(x, delta, layer.mlp_norm, eps)
            act = silu_mul(linear(h, layer.gate_up, layer.gate_up_bias))
            delta = self._whole(linear(act, layer.down.weight, layer.down.bias))
            if i in tap_layer_ids:
                x, delta = x + delta, None
                taps[i] = x.clone()
        return x, delta, taps

    def write_context(
        self,
        features: torch.Tensor,  # [N, d]
        positions: torch.Tensor,  # [N]
        slots: torch.Tensor,  # [N]
        kv: PagedKVCache,
    ) -> None:
        """Keys and values that every layer makes of rows which it does not attend from."""
        from dspark.kernels.triton.cache_write import rotate_write

        cos, sin = self._turns(positions)
        queries = self._heads * self._width
        for i, layer in enumerate(self._layers):
            bias = None if layer.qkv_bias is None else layer.qkv_bias[queries:]
            made = self._linear(features, layer.qkv[queries:], bias)
            store = self._store(kv, i, made)
            rotate_write(made, cos, sin, layer.norms, self._eps, store.keys, store.values, slots)

    def _turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, D/2] of positions [T]."""
        angles = positions.float()[:, None] * self._rotary.inv_freq.float()
        scaling = self._rotary.attention_scaling
        return angles.cos() * scaling, angles.sin() * scaling

    def _whole(self, delta: torch.Tensor) -> torch.Tensor:
        if self._shard is not None:
            self._shard.add_up(delta)
        return delta

    def _store(self, kv: PagedKVCache, layer: int, like: torch.Tensor) -> TritonStore:
        if not kv.holds(layer):
            row = like.new_empty(0, self._kv_heads, self._width)
            kv.allocate(layer, row, row)
        store = kv.layer(layer)
        assert isinstance(store, TritonStore)  # as fits() has asked
        return store


class TritonDecoder:
    """A decoder's layers and final norm, for steps over pages."""

    def __init__(
        self, model: Any, *, batch_invariant: bool = False, shard: Shard | None = None
    ) -> None:
        """Makes views of the weights of `model`, which is the part `shard` of a target, if any.

        `batch_invariant`: products by our kernel and attention in tiles of one size, so that what
        a row says does not depend on the rows beside it, to the bit.
        """
        if batch_invariant:
            _check_tensor_cores(model.device)
        self._linear = product(model.device, model.dtype, batch_invariant=batch_invariant)
        config, decoder = model.config.get_text_config(), model.get_decoder()
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._final_norm: torch.Tensor = decoder.norm.weight
        self._lm_head = model.get_output_embeddings()
        self._eps: float = config.rms_norm_eps
        self._layers = TritonLayers(
            config,
            decoder.layers,
            decoder.rotary_emb,
            linear=self._linear,
            one_size=batch_invariant,
            shard=shard,
        )

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this loop computes what the model's own modules do."""
        config, decoder = model.config.get_text_config(), model.get_decoder()
        # Other families' decoders need not even have the parts that are looked at below.
        return config.model_type in FAMILIES and TritonLayers.fits(
            config, decoder.layers, decoder.rotary_emb, model.dtype, model.device
        )

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        plan: AttentionPlan | RowPlan,
        kv: PagedKVCache,
        logit_rows: torch.Tensor,  # [N]
        tap_layer_ids: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normed hidden states [N, d] of the logit rows, and taps [T, m·d] side by side."""
        from dspark.kernels.triton.rows import add_rms_norm

        x = F.embedding(token_ids, self._embedding)
        x, delta, taps = self._layers.run(x, plan, kv, tap_layer_ids)
        if len(logit_rows) < len(x):
            x, delta = x[logit_rows], None if delta is None else delta[logit_rows]
        hidden = add_rms_norm(x, delta, self._final_norm, self._eps)
        if not tap_layer_ids:
            return hidden, None
        return hidden, torch.cat([taps[i] for i in tap_layer_ids], dim=-1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, V]."""
        return self._linear(hidden, self._lm_head.weight, self._lm_head.bias)


def product(device: torch.device, dtype: torch.dtype, *, batch_invariant: bool = False) -> Linear:
    """The fastest product there is, or the one whose rows do not depend on each other."""
    from dspark.kernels.triton.linear import NARROW_ROWS, linear, narrow_linear, narrow_pays

    if batch_invariant:
        return linear
    if not narrow_pays(device, dtype):
        return F.linear

    def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (narrow_linear if len(x) <= NARROW_ROWS else F.linear)(x, weight, bias)

    return by_rows


def _check_tensor_cores(device: torch.device) -> None:
    from dspark.kernels.triton.linear import LEAST_CAPABILITY

    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < LEAST_CAPABILITY:
        raise ConfigError(
            f"batch_invariant needs a GPU of compute capability {LEAST_CAPABILITY / 10} or later; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )


def _layer(layer: Any, window: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight, attention.k_norm.weight
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        norms=norms,
        out=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj,
        window=window,
    )


def _joined(*parts: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one product in the place of several, whose own become views."""
    sizes = [part.out_features for part in parts]
    weight = torch.cat([part.weight.data for part in parts])
    for part, view in zip(parts, weight.split(sizes), strict=True):
        part.weight.data = view
    if parts[0].bias is None:
        return weight, None
    bias = torch.cat([part.bias.data for part in parts])
    for part, view in zip(parts, bias.split(sizes), strict=True):
        part.bias.data = view
    return weight, bias
