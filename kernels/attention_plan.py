"""Where the rows of one step lie and what they see: made once a step, used by every layer.

Made with numpy, since a step of a small model is over before torch has made a dozen small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

PAGE_SIZE = 16  # slots

Pages = npt.NDArray[np.int32]


@dataclass
class AttentionPlan:
    """T rows of S sequences, flattened, each sequence's rows being its newest positions."""

    positions: torch.Tensor  # [T] int64, rising by one within a sequence
    reach: torch.Tensor  # [T] int64: the last position that a row sees
    slots: torch.Tensor  # [T] int64: where each row's own key and value go
    row_counts: Sequence[int]  # rows of each sequence, at least one
    row_starts: torch.Tensor  # [S + 1] int64: first row of each sequence, and T
    kv_lens: Sequence[int]  # positions of each sequence, the new rows included
    tables: torch.Tensor  # [S, W] int32: pages of each sequence, in order, padded with 0
    window: int | None = None  # keys that a row sees up to its reach; None: the layer decides
    derived: dict[str, object] = field(default_factory=dict)  # what one kernel alone needs


def plan_attention(
    pages: Sequence[Pages],  # S × [pages held], in order; may hold more than are needed
    starts: Sequence[int],  # S: positions before the new rows
    row_counts: Sequence[int],  # S: new rows
    device: torch.device | str = "cpu",
    *,
    block: bool = False,  # rows of a sequence see each other, later ones too
    window: int | None = None,
) -> AttentionPlan:
    """The plan of one step."""
    counts = np.asarray(row_counts, dtype=np.int64)
    first = np.asarray(starts, dtype=np.int64)
    ends = first + counts
    row_starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=row_starts[1:])
    tables = np.zeros((len(counts), -(-int(ends.max()) // PAGE_SIZE)), dtype=np.int32)
    for table, held, end in zip(tables, pages, ends.tolist(), strict=True):
        need = -(-end // PAGE_SIZE)
        table[:need] = held[:need]
    of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(row_starts[-1]) + (first - row_starts[:-1])[of]
    slots = tables[of, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
    on_device = (
        torch.from_numpy(array).to(device)
        for array in (positions, ends[of] - 1 if block else positions, slots, row_starts, tables)
    )
    position_tensor, reach, slot_tensor, row_start_tensor, table_tensor = on_device
    return AttentionPlan(
        positions=position_tensor,
        reach=reach,
        slots=slot_tensor,
        row_counts=row_counts,
        row_starts=row_start_tensor,
        kv_lens=ends.tolist(),
        tables=table_tensor,
        window=window,
    )
