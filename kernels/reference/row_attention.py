"""Attention of rows that are each a sequence of its own, in shapes that do not depend on them.

The T rows of a step gather W pages each, whatever they see, so that one captured graph serves
every step of its shape (paper §5.3). Rows of one sequence gather the same pages again, which is the
price: paged_attention is for steps where it is too high.

What a row does not see is read from slot 0. Nobody writes there, and it holds zeros: even a masked
NaN would spread.

Symbols as in dspark.kernels.reference.paged_attention, with L = W · PAGE_SIZE.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark.kernels.attention_plan import PAGE_SIZE, RowPlan
from dspark.kernels.reference.paged_attention import explicit_attention

# cuDNN's, which torch prefers on some GPUs, is planned anew for every shape.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def row_attention(
    query: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [slots, G, D]
    values: torch.Tensor,  # [slots, G, Dv]
    plan: RowPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H] a logit that joins the softmax and is dropped
) -> torch.Tensor:  # [T, H, Dv]
    """softmax(scale · q kᵀ) v over each row's visible keys."""
    rows, heads, _ = query.shape
    kv_heads = keys.shape[1]
    slots, mask = _seen(plan, window, query.dtype)
    k = keys.index_select(0, slots).view(rows, -1, kv_heads, keys.shape[2]).transpose(1, 2)
    v = values.index_select(0, slots).view(rows, -1, kv_heads, values.shape[2]).transpose(1, 2)
    q = query.reshape(rows, kv_heads, heads // kv_heads, -1)  # the heads that share keys
    if softcap is None and sinks is None:
        with sdpa_kernel(_BACKENDS):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = explicit_attention(q, k, v, mask, scale, softcap, sinks, 1)
    return out.reshape(rows, heads, -1)


def _seen(
    plan: RowPlan, window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # [T·L] int64, [T, 1, 1, L]
    """Slots to read and the additive mask; made once a step and shared by all layers."""
    made = plan.derived.get((window, dtype))
    if made is None:
        device = plan.tables.device
        slots = plan.tables.long()[..., None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
        slots = slots.flatten(1)
        key = torch.arange(slots.shape[1], device=device)
        reach = plan.reach[:, None]
        seen = key <= reach
        first = plan.first_seen(window)
        if first is not None:
            seen &= key >= first[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        made = plan.derived[window, dtype] = ((slots * seen).flatten(), mask)
    return cast("tuple[torch.Tensor, torch.Tensor]", made)
