"""What the target knows of a batch of conversations, captured in the forward that trains on it.

Nothing is cached on disk: the target runs again for every batch, which for a small drafter costs
about as much as the drafter's own step, and for a large target saves terabytes (paper §3.3). Its
law is the large part: it is kept for rows that blocks were chosen to draft, and for no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.kernels.transfer import to_device
from dspark.models.target import TargetModel
from dspark.training.losses import TargetLaw, restrict
from dspark.training.text import Conversation


@dataclass(frozen=True, slots=True)
class Rows:
    """Conversations end to end, T rows, on the host."""

    texts: list[torch.Tensor]  # C × [L_c] int64
    positions: torch.Tensor  # [T] in its conversation
    conversations: torch.Tensor  # [T] which conversation
    anchors: torch.Tensor  # [N] rows of answers that another token follows

    @staticmethod
    def of(conversations: Sequence[Conversation], max_tokens: int) -> Rows:
        """Conversations cut to `max_tokens` each."""
        texts = [torch.tensor((c.prompt + c.answer)[:max_tokens]) for c in conversations]
        counts = torch.tensor([len(text) for text in texts])
        of = torch.repeat_interleave(torch.arange(len(texts)), counts)
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        first = torch.tensor([len(c.prompt) for c in conversations])[of]
        inside = (positions >= first) & (positions < counts[of] - 1)
        return Rows(texts, positions, of, inside.nonzero()[:, 0])

    def drafted_from(self, anchors: torch.Tensor, block_size: int) -> torch.Tensor:
        """The rows whose law says how good blocks at `anchors` [A] are: [N'], rising."""
        wanted = torch.zeros(len(self.positions) + block_size, dtype=torch.bool)
        wanted[anchors[:, None] + torch.arange(block_size)] = True
        return self.anchors[wanted[self.anchors]]


@dataclass(frozen=True, slots=True)
class Captured:
    """What is known of some Rows; on the target's device, where nothing else is said."""

    rows: Rows  # on the host
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    taps: torch.Tensor  # [T, m·d_t]
    law_rows: torch.Tensor  # [T] index into law, -1 on rows without one
    law: TargetLaw  # [N, V_d] of the token that follows
    choices: torch.Tensor  # [N] the target's most likely next token


def capture(
    target: TargetModel,
    rows: Rows,
    draft_token_ids: torch.Tensor,  # [V_d]
    judged: torch.Tensor | None = None,  # [N] rows whose law is wanted, rising; None: all anchors
) -> Captured:
    """Run the target over whole conversations."""
    judged = rows.anchors if judged is None else judged
    law_rows = torch.full_like(rows.positions, -1)
    law_rows[judged] = torch.arange(len(judged))
    out = target.forward_whole(rows.texts, judged)
    assert out.taps is not None
    tokens, positions, law_rows = to_device(
        [torch.cat(rows.texts), rows.positions, law_rows], target.device
    )
    with torch.no_grad():
        return Captured(
            rows,
            tokens,
            positions,
            out.taps.clone(),  # an inference tensor cannot take part in autograd
            law_rows,
            restrict(out.logits, draft_token_ids),
            out.logits.argmax(dim=-1).clone(),
        )
