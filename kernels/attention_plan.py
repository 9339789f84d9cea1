"""Where the rows of one step lie and what they see: made once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

PAGE_SIZE = 16  # slots


@dataclass
class AttentionPlan:
    """T rows of S sequences, flattened; what one kernel alone needs, it derives on first use."""

    positions: torch.Tensor  # [T] int64, rising by one within a sequence
    slots: torch.Tensor  # [T] int64: where each row's own key and value go
    row_counts: Sequence[int]  # rows of each sequence, at least one
    key_slots: Sequence[torch.Tensor]  # S × [kv_len] int64: slots of positions 0 .. kv_len-1
    derived: dict[str, object] = field(default_factory=dict)

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """[S + 1] int64: first row of each sequence, and T."""
        starts = torch.zeros(len(self.row_counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(self.row_counts), 0, out=starts[1:])
        return starts

    @cached_property
    def tables(self) -> torch.Tensor:
        """[S, W] int32: pages of each sequence, in order, padded with 0."""
        pages = [slots[::PAGE_SIZE] // PAGE_SIZE for slots in self.key_slots]
        table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        return table.to(torch.int32)


def plan_attention(
    positions: torch.Tensor,  # [T] int64
    slots: torch.Tensor,  # [T] int64
    row_counts: Sequence[int],  # Q_s
    key_slots: Sequence[torch.Tensor],  # S × [kv_len_s] int64
) -> AttentionPlan:
    """The plan of one step."""
    return AttentionPlan(positions, slots, row_counts, key_slots)
