"""Causal attention of whole sequences, padded at the end to one length: nothing is cached.

Symbols: S sequences of L rows, T = S · L, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dspark.kernels.reference.paged_attention import explicit_attention


def whole_attention(
    query: torch.Tensor,  # [H, T, D]
    keys: torch.Tensor,  # [G, T, D]
    values: torch.Tensor,  # [G, T, Dv]
    sequences: int,  # S
    *,
    scale: float,
    window: int | None = None,  # a row sees so many rows, itself included
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H] a logit that joins the softmax and is dropped
) -> torch.Tensor:  # [T, H, Dv]
    """softmax(scale · q kᵀ) v over the rows up to each one's own."""
    heads, kv_heads, length = len(query), len(keys), query.shape[1] // sequences
    q, k, v = (
        x.unflatten(1, (sequences, length)).transpose(0, 1) for x in (query, keys, values)
    )  # [S, heads, L, width]
    if window is not None and window >= length:
        window = None
    if window is None and softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
    else:
        row = torch.arange(length, device=query.device)
        unseen = row > row[:, None]
        if window is not None:
            unseen |= row <= row[:, None] - window
        mask = torch.zeros(length, length, dtype=q.dtype, device=q.device)
        mask.masked_fill_(unseen, float("-inf"))
        fold = heads // kv_heads
        folded = q.reshape(sequences, kv_heads, fold * length, -1)
        mask = mask.expand(sequences, fold, length, length).reshape(sequences, 1, -1, length)
        out = explicit_attention(folded, k, v, mask, scale, softcap, sinks, length)
        out = out.reshape(sequences, heads, length, -1)
    return out.permute(0, 2, 1, 3).reshape(sequences * length, heads, -1)
