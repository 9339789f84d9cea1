"""What the target knows of a batch of conversations, captured in the forward that trains on it.

Nothing is cached on disk: the target runs again for every batch, which for a small drafter costs
about as much as the drafter's own step, and for a large target saves terabytes (paper §3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dspark.engine.sequence import pages_for
from dspark.kernels.attention_plan import plan_attention
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.training.losses import TargetLaw, restrict
from dspark.training.text import Conversation


@dataclass(frozen=True, slots=True)
class Captured:
    """Some conversations end to end, T rows: tokens, tapped states, and the target's law.

    The law is kept where tokens are drafted: on N rows, those of an answer that another token
    follows.
    """

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] in its conversation
    conversations: torch.Tensor  # [T] which conversation
    taps: torch.Tensor  # [T, m·d_t]
    anchors: torch.Tensor  # [N] the rows with a law
    law_rows: torch.Tensor  # [T] index into law, -1 on other rows
    law: TargetLaw  # [N, V_d] of the token that follows
    choices: torch.Tensor  # [N] the target's most likely next token


def capture(
    target: TargetModel,
    conversations: Sequence[Conversation],
    draft_token_ids: torch.Tensor,  # [V_d]
    max_tokens: int,
) -> Captured:
    """Run the target over whole conversations, cut to `max_tokens` each."""
    device = target.device
    rows = [(c.prompt + c.answer)[:max_tokens] for c in conversations]
    counts = [len(r) for r in rows]
    pages = [pages_for(n) for n in counts]
    kv = PagedKVCache(sum(pages) + 1, device)
    ends = np.cumsum(pages) + 1
    tables = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(pages, ends, strict=True)]
    positions = torch.cat([torch.arange(n) for n in counts])
    of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    first = torch.tensor([len(c.prompt) for c in conversations])[of]
    last = torch.tensor(counts)[of] - 1
    anchors = ((positions >= first) & (positions < last)).nonzero()[:, 0]
    law_rows = torch.full_like(positions, -1)
    law_rows[anchors] = torch.arange(len(anchors))
    tokens = torch.tensor([t for r in rows for t in r])
    attention = plan_attention(tables, [0] * len(rows), counts, device)
    out = target.forward(TargetBatch(tokens, attention, logit_rows=anchors), kv)
    assert out.taps is not None
    tokens, positions, anchors = (t.to(device) for t in (tokens, positions, anchors))
    with torch.no_grad():
        return Captured(
            tokens,
            positions,
            of.to(device),
            out.taps.clone(),  # an inference tensor cannot take part in autograd
            anchors,
            law_rows.to(device),
            restrict(out.logits, draft_token_ids),
            out.logits.argmax(dim=-1).clone(),
        )
