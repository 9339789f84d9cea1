"""What the target knows of a batch of conversations, captured in the forward that trains on it.

Nothing is cached on disk: the target runs again for every batch, which for a small drafter costs
about as much as the drafter's own step, and for a large target saves terabytes (paper §3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.engine.sequence import pages_for, slots_of_pages
from dspark.kernels.reference.paged_attention import plan_attention
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel
from dspark.training.losses import TargetLaw, restrict
from dspark.training.text import Conversation


@dataclass(frozen=True, slots=True)
class Captured:
    """One conversation: tokens, tapped states, and the target's law where tokens are drafted."""

    tokens: torch.Tensor  # [T]
    taps: torch.Tensor  # [T, m·d_t]
    first: int  # position of the first answer token; rows of `law` start here
    law: TargetLaw  # of positions first .. T-2, for the token that follows each
    choices: torch.Tensor  # [T-1-first] the target's most likely next token


def capture(
    target: TargetModel,
    conversations: Sequence[Conversation],
    draft_token_ids: torch.Tensor,  # [V_d]
    max_tokens: int,
) -> list[Captured]:
    """Run the target over whole conversations, cut to `max_tokens` each."""
    device = target.device
    rows = [(c.prompt + c.answer)[:max_tokens] for c in conversations]
    firsts = [len(c.prompt) for c in conversations]
    counts = [len(r) for r in rows]
    pages = [pages_for(n) for n in counts]
    kv = PagedKVCache(sum(pages) + 1, device)
    slots, start = [], 1
    for need, count in zip(pages, counts, strict=True):
        slots.append(slots_of_pages(list(range(start, start + need)))[:count].to(device))
        start += need
    positions = torch.cat([torch.arange(n, device=device) for n in counts])
    own = torch.cat(slots)
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    wanted = [
        row
        for offset, first, count in zip(offsets, firsts, counts, strict=True)
        for row in range(offset + first, offset + count - 1)
    ]
    batch = TargetBatch(
        token_ids=torch.tensor([t for r in rows for t in r], device=device),
        positions=positions,
        attention=plan_attention(positions, own, counts, slots),
        logit_rows=torch.tensor(wanted, dtype=torch.int64, device=device),
    )
    out = target.forward(batch, kv)
    assert out.taps is not None
    with torch.no_grad():
        law = restrict(out.logits, draft_token_ids)
        choices = out.logits.argmax(dim=-1).clone()
        taps = out.taps.clone()  # an inference tensor cannot take part in autograd
    captured, done = [], 0
    for offset, first, count in zip(offsets, firsts, counts, strict=True):
        n = max(0, count - 1 - first)
        span = slice(done, done + n)
        captured.append(
            Captured(
                tokens=batch.token_ids[offset : offset + count],
                taps=taps[offset : offset + count],
                first=first,
                law=TargetLaw(law.probs[span], law.outside[span]),
                choices=choices[span],
            )
        )
        done += n
    return captured
