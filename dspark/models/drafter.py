"""The DSpark drafter (paper §3.1): a parallel backbone, a sequential head, a confidence head.

    H_ctx = RMSNorm(fc [H^(l1); …; H^(lm)])             context features, from the target's layers
    K = [W_K H_ctx ; W_K H_d],  V likewise               in every layer; bidirectional in the block
    [h_1 … h_γ] = backbone([anchor, mask × (γ-1)])       row k predicts draft token k
    U_k = LMhead(h_k)                                    the target's, on the draft vocabulary, and
                                                         soft-capped where the target's is
    p_k ∝ exp(U_k + B_k)                                 B: dspark.models.sequential_head
    c_k = σ(w · [h_k ; W1[x_{k-1}]])                     P(x_k accepted | x_<k accepted)

Where `sample_from_anchor` is false, the anchor's own row predicts nothing: the block is
[anchor, mask × γ] and its masks are filled in, as DFlash and speculators' checkpoints do.

The layers are the target family's own, taken from transformers by configuration; what differs
around them is in dspark.models.families. The context comes in through the layer's cache argument:
what attention sees as past keys are the projected features. A sliding layer sees the positions
after that of the row less its window, and all of the block.

Shape symbols: S sessions, γ block size, L context rows, d width, m tapped layers, d_t target width,
V vocabulary, V_d draft vocabulary, r Markov rank, G KV heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel

from dspark.config import MAX_BLOCK_SIZE
from dspark.decoding.drawing import likeliest_logit
from dspark.errors import CheckpointError
from dspark.models import families
from dspark.models.sequential_head import ConfidenceHead, check_head, sequential_head


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Shape of a drafter; names are those of the published checkpoints."""

    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    markov_rank: int
    target_hidden_size: int
    vocab_size: int  # V, the target's
    draft_vocab_size: int  # V_d
    context_window: int  # a block sees this many context rows before its anchor; 0: all
    backbone: dict[str, Any] = field(hash=False)  # transformers configuration of the layers
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True  # whether it sees W1[x_{k-1}]
    sample_from_anchor: bool = True  # whether the anchor's row predicts the first draft token

    @property
    def hidden_size(self) -> int:
        """d, the width of features and backbone."""
        return int(self.backbone["hidden_size"])

    @property
    def trained_length(self) -> int:
        """Positions that the layers' rotary embedding was trained for; 0 if it is not said."""
        return int(self.backbone.get("max_position_embeddings", 0))

    def rows(self, block_size: int) -> int:
        """Rows that a block of so many draft tokens takes."""
        return block_size + (not self.sample_from_anchor)

    def __post_init__(self) -> None:
        missing = {"model_type", "hidden_size"} - self.backbone.keys()
        if missing:
            raise CheckpointError(f"the drafter's backbone does not say its {sorted(missing)}")
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:  # more would not cross the wire
            raise CheckpointError(
                f"block_size must be between 1 and {MAX_BLOCK_SIZE}; got {self.block_size}"
            )
        layers = self.target_layer_ids
        if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
            raise CheckpointError(f"target_layer_ids must rise from 0 or later; got {list(layers)}")
        if self.context_window < 0:
            raise CheckpointError(
                f"context_window must be at least 0 (all); got {self.context_window}"
            )
        check_head(self.markov_head_type, self.markov_rank)
        if (
            self.enable_confidence_head
            and self.confidence_head_with_markov
            and not self.markov_rank
        ):
            raise CheckpointError(
                "confidence_head_with_markov needs a Markov head; markov_rank is 0"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise CheckpointError(
                f"mask_token_id {self.mask_token_id} lies outside the vocabulary of "
                f"{self.vocab_size}"
            )
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise CheckpointError(
                f"draft_vocab_size must be between 1 and {self.vocab_size}; got "
                f"{self.draft_vocab_size}"
            )


class ContextKV(Protocol):
    """Keys and values of the context features, by layer."""

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, G, L, D] of one drafter layer."""


class _InjectedContext:
    """Poses as a layer's cache: past keys are the context's, and nothing is stored."""

    def __init__(self, context: ContextKV) -> None:
        self._context = context

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past_keys, past_values = self._context.layer(layer)
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


class FeatureProjection(nn.Module):
    """hidden_norm(fc(·)): what the verifier computes and ships, d values a token."""

    def __init__(self, fc: nn.Module, hidden_norm: nn.Module) -> None:
        super().__init__()
        self.fc = fc
        self.hidden_norm = hidden_norm

    def forward(self, taps: torch.Tensor) -> torch.Tensor:  # [T, m·d_t] -> [T, d]
        """Project tapped hidden states to context features."""
        out: torch.Tensor = self.hidden_norm(self.fc(taps))
        return out


class DSparkDrafter(nn.Module):
    """The network alone, as it is trained; dspark.models.draft_forward runs it when serving."""

    embed_weight: torch.Tensor  # [V, d] the target's, frozen
    head_weight: torch.Tensor  # [V_d, d] the target's rows of the draft vocabulary, frozen
    draft_token_ids: torch.Tensor  # [V_d] int64, rising; draft id -> target id

    def __init__(
        self,
        config: DrafterConfig,
        embed_weight: torch.Tensor,  # [V, d]
        lm_head_weight: torch.Tensor,  # [V, d], or [V_d, d] of the draft vocabulary alone
        draft_token_ids: torch.Tensor,  # [V_d]
    ) -> None:
        super().__init__()
        if tuple(embed_weight.shape) != (config.vocab_size, config.hidden_size):
            raise CheckpointError(
                f"the drafter wants a target embedding of {config.vocab_size} × "
                f"{config.hidden_size}, this target has {' × '.join(map(str, embed_weight.shape))}"
            )
        self.config = config
        backbone = _backbone(config)
        self._layout = backbone.config
        family = families.family(self._layout.model_type)
        self.embed_scale = config.hidden_size**0.5 if family.scaled_embedding else 1.0
        self.softcap: float | None = getattr(self._layout, "final_logit_softcapping", None)
        self.windows = _windows(config, self._layout)
        self.layers = backbone.layers
        self.norm = backbone.norm
        self.rotary_emb = backbone.rotary_emb
        taps = len(config.target_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(taps, config.hidden_size, bias=False)
        self.hidden_norm = copy.deepcopy(backbone.norm)
        self.markov_head = sequential_head(
            config.markov_head_type,
            config.markov_rank,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.draft_vocab_size,
            hidden_size=config.hidden_size,
        )
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            rank = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(config.hidden_size, rank)
        head = lm_head_weight.detach()
        # Buffers that are not saved: they are the target's.
        self.register_buffer("embed_weight", embed_weight.detach(), persistent=False)
        self.register_buffer(
            "head_weight",
            head if len(head) == len(draft_token_ids) else head[draft_token_ids],
            persistent=False,
        )
        self.register_buffer("draft_token_ids", draft_token_ids, persistent=False)

    @property
    def feature_projection(self) -> FeatureProjection:
        """The verifier's part of the drafter."""
        return FeatureProjection(self.fc, self.hidden_norm)

    def context_kv(
        self,
        features: torch.Tensor,  # [..., L, d]
        positions: torch.Tensor,  # [..., L]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:  # by layer, [..., G, L, D]
        """Keys and values that context features have in every layer."""
        flat = features.reshape(-1, features.shape[-2], features.shape[-1])
        turns = self.rotary(flat, positions.reshape(-1, positions.shape[-1]))
        lead = features.shape[:-2]
        out = []
        for layer, turn in zip(self.layers, turns, strict=True):
            keys, values = families.context_kv(layer.self_attn, flat, *turn)
            out.append(
                (keys.reshape(*lead, *keys.shape[1:]), values.reshape(*lead, *values.shape[1:]))
            )
        return out

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., d]
        """Tokens as the layers take them, in the weights' type."""
        x = F.embedding(token_ids, self.embed_weight).to(self.norm.weight.dtype)
        if self.embed_scale == 1.0:
            return x
        return x * float(torch.tensor(self.embed_scale, dtype=x.dtype))  # rounded, as targets do

    def rotary(
        self,
        x: torch.Tensor,  # [S, L, d] of the type and device that are wanted
        positions: torch.Tensor,  # [S, L]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:  # by layer, [S, L, D] each
        """Cosines and sines of every layer."""
        return families.rotary_by_layer(self._layout, self.rotary_emb, x, positions)

    def hidden(
        self,
        token_ids: torch.Tensor,  # [S, Q] anchors and masks
        positions: torch.Tensor,  # [S, Q]
        context: ContextKV,
        masks: Sequence[torch.Tensor],  # by layer, [S, 1, Q, L + Q] additive, as the weights' dtype
    ) -> torch.Tensor:  # [S, Q, d]
        """Backbone hidden states h, final norm applied."""
        capped = getattr(self.layers[0].self_attn, "attn_logit_softcapping", None)
        self.use_attention("eager" if capped else "sdpa")  # torch's own has no cap
        x = self.embed(token_ids)
        cache = _InjectedContext(context)
        for layer, mask, turn in zip(self.layers, masks, self.rotary(x, positions), strict=True):
            x = layer(
                x,
                attention_mask=mask,
                position_embeddings=turn,
                past_key_values=cache,
                use_cache=True,
            )
        out: torch.Tensor = self.norm(x)
        return out

    def use_attention(self, name: str) -> None:
        """Choose the attention that the layers' next call goes through (transformers' names)."""
        for layer in self.layers:
            layer.self_attn.config._attn_implementation = name

    def block_tokens(self, anchors: torch.Tensor, block_size: int) -> torch.Tensor:
        """[S] anchors to [S, rows]: the anchor, then masks."""
        rows = self.config.rows(block_size)
        block = anchors.new_full((*anchors.shape, rows), self.config.mask_token_id)
        block[..., 0] = anchors
        return block

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:  # [S, rows, d] -> [S, γ, d]
        """The rows that predict a draft token."""
        return hidden if self.config.sample_from_anchor else hidden[:, 1:]

    def confidence_logits(
        self,
        hidden: torch.Tensor,  # [..., d]
        embedded: torch.Tensor,  # [..., r]
        logits: torch.Tensor,  # [..., V_d] of the proposal
    ) -> torch.Tensor:  # [...]
        """Of the chance that the token to be drawn is accepted.

        Without a confidence head, that of the likeliest token, for calibration to begin with.
        """
        if self.confidence_head is not None:
            out: torch.Tensor = self.confidence_head(hidden, embedded)
            return out
        return likeliest_logit(logits.detach())

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., d] -> [..., V_d]
        """U: the target's LM head on the draft vocabulary."""
        return self.cap(F.linear(hidden, self.head_weight.to(hidden.dtype)))

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Base logits as the target softens them, if it does; the head's bias comes after."""
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def for_inference(self, dtype: torch.dtype, device: str = "cpu") -> DSparkDrafter:
        """Freeze and cast, in place; returns itself."""
        return self.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _backbone(config: DrafterConfig) -> Any:
    settings = families.own_settings(config.backbone)
    model_type = settings.pop("model_type")
    try:
        # No embedding of its own: one row is the least that transformers makes.
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        hf = AutoConfig.for_model(
            model_type, **{**copy.deepcopy(settings), **tokens, "vocab_size": 1}
        )
        families.check_layers(hf, settings)
        return AutoModel.from_config(hf, attn_implementation="eager")
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"the drafter's backbone of type {model_type!r} cannot be built: {error}"
        ) from error


def _windows(config: DrafterConfig, layout: Any) -> tuple[int | None, ...]:
    """Each layer's window; a block is never wider than one, so that all of it is seen."""
    windows = tuple(families.layer_window(layout, i) for i in range(layout.num_hidden_layers))
    rows = config.rows(config.block_size)
    if any(window is not None and window < rows for window in windows):
        raise CheckpointError(
            f"sliding_window must be at least the {rows} rows of a block; got "
            f"{layout.sliding_window}"
        )
    return windows
