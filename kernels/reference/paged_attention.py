"""Attention of flattened, variable-length queries over a paged KV cache: the torch reference.

Every sequence s of a step brings Q_s query rows at consecutive positions and attends to its first
kv_len_s keys, of which a row sees those up to its reach (and from its first on, where the layer
slides). Sequences with few rows are padded into one batch; long ones (prefill chunks) go
one by one, since padding the others to their length would cost more than the calls.

Symbols: T rows in the step, S sequences, Q rows of a sequence, L keys, H query heads, G KV heads,
D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan

_LONG_ROWS = 16
_GROUPS = "reference groups"


@dataclass(slots=True)
class _Group:
    sequences: int  # S
    longest: int  # Q
    rows: torch.Tensor | None  # [S·Q] index into the step's rows; padding repeats one; None: all
    kept: torch.Tensor  # [n] those of the S·Q that are no padding
    to: torch.Tensor  # [n] rows of the step that they are
    reach: torch.Tensor  # [S, Q]
    slots: torch.Tensor  # [S, L] index into the cache; padding is slot 0
    kv_lens: torch.Tensor  # [S]
    index: torch.Tensor  # [S·Q] like `rows`, but always there
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def mask(
        self, plan: AttentionPlan, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:  # [S, 1, Q, L]
        """Additive mask, made once a step for each window and shared by all layers."""
        made = self.masks.get((window, dtype))
        if made is None:
            key = torch.arange(self.slots.shape[1], device=self.slots.device)
            seen = key <= self.reach[..., None]
            seen &= key < self.kv_lens[:, None, None]
            first = plan.first_seen(window)
            if first is not None:
                seen &= key >= first[self.index].view(*self.reach.shape, 1)
            made = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            made = made.masked_fill_(~seen, float("-inf"))[:, None]
            self.masks[window, dtype] = made
        return made


def _groups(plan: AttentionPlan) -> list[_Group]:
    """A step's sequences by how they are best computed."""
    if _GROUPS in plan.derived:
        return cast("list[_Group]", plan.derived[_GROUPS])
    counts = plan.row_counts
    groups = [_group([s], plan) for s, count in enumerate(counts) if count > _LONG_ROWS]
    short = [s for s, count in enumerate(counts) if count <= _LONG_ROWS]
    if short:
        groups.append(_group(short, plan))
    plan.derived[_GROUPS] = groups
    return groups


def _group(members: list[int], plan: AttentionPlan) -> _Group:
    # Who is where is known on the host; asking the device would mean waiting for it.
    counts = np.array([plan.row_counts[s] for s in members])
    kv_lens = np.array([plan.kv_lens[s] for s in members])
    longest, length = int(counts.max()), int(kv_lens.max())
    offset = np.arange(longest)
    row_starts = plan.row_starts.numpy()[members, None]
    rows = (row_starts + np.minimum(offset, counts[:, None] - 1)).flatten()
    kept = np.flatnonzero(offset < counts[:, None])
    whole = len(kept) == len(rows) == len(plan.reach)
    chosen, index, kept_index, to, lens = plan.move(
        *map(torch.from_numpy, (np.array(members), rows, kept, rows[kept], kv_lens))
    )
    inside = torch.arange(PAGE_SIZE, device=plan.device)
    slots = (plan.placed.tables[chosen].long()[..., None] * PAGE_SIZE + inside).flatten(1)[
        :, :length
    ]
    # What lies past a sequence's end is someone else's: even a masked NaN would spread.
    slots = slots * (torch.arange(length, device=plan.device) < lens[:, None])
    return _Group(
        sequences=len(members),
        longest=longest,
        rows=None if whole else index,
        kept=kept_index,
        to=to,
        reach=plan.placed.reach[index].view(len(members), longest),
        slots=slots,
        kv_lens=lens,
        index=index,
    )


def paged_attention(
    query: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [slots, G, D]
    values: torch.Tensor,  # [slots, G, Dv]
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H] a logit that joins the softmax and is dropped
) -> torch.Tensor:  # [T, H, Dv]
    """softmax(scale · q kᵀ) v over each sequence's visible keys."""
    heads, kv_heads, width = query.shape[1], keys.shape[1], values.shape[2]
    fold = heads // kv_heads
    out = query.new_empty(query.shape[0], heads, width)
    for group in _groups(plan):
        batch, rows = group.sequences, group.longest
        length = group.slots.shape[1]
        flat = group.slots.flatten()
        k = keys.index_select(0, flat).view(batch, length, kv_heads, -1).transpose(1, 2)
        v = values.index_select(0, flat).view(batch, length, kv_heads, -1).transpose(1, 2)
        q = query if group.rows is None else query.index_select(0, group.rows)
        # The query heads of one KV head become extra rows, so that its keys are read once.
        q = q.view(batch, rows, kv_heads, fold, -1).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch, kv_heads, fold * rows, -1)
        mask = group.mask(plan, window, query.dtype)
        mask = mask.expand(batch, fold, rows, length).reshape(batch, 1, fold * rows, length)
        if softcap is None and sinks is None:
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            got = explicit_attention(q, k, v, mask, scale, softcap, sinks, rows)
        got = got.view(batch, kv_heads, fold, rows, width).permute(0, 3, 1, 2, 4)
        got = got.reshape(batch * rows, heads, width)
        if group.rows is None:
            out.copy_(got)
        else:
            out.index_copy_(0, group.to, got.index_select(0, group.kept))
    return out


def explicit_attention(
    q: torch.Tensor,  # [S, G, fold·Q, D]
    k: torch.Tensor,  # [S, G, L, D]
    v: torch.Tensor,  # [S, G, L, Dv]
    mask: torch.Tensor,  # [S, 1, fold·Q, L]
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    rows: int,
) -> torch.Tensor:  # [S, G, fold·Q, Dv]
    """Attention with what torch's own has no argument for."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.float()
    if sinks is not None:
        column = sinks.float().view(1, k.shape[1], -1, 1).expand(q.shape[0], -1, -1, rows)
        column = column.reshape(q.shape[0], k.shape[1], -1, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return torch.matmul(weights.to(v.dtype), v)
