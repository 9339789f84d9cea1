"""Where the rows of one step lie and what they see: made once a step, used by every layer.

Made with numpy, since a step of a small model is over before torch has made a dozen small tensors,
and kept on the host until the device asks: then all of it goes there in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from dspark.kernels.transfer import to_device

PAGE_SIZE = 16  # slots
TILE_ROWS = 8  # of a tile of few rows: an anchor and its block, mostly
FEW_ROWS = 16  # of one sequence; more are a prompt's

Pages = npt.NDArray[np.int32]


def pages_for(tokens: int) -> int:
    """Pages that `tokens` positions need."""
    return -(-tokens // PAGE_SIZE)


class Tiles(NamedTuple):
    """Rows of one sequence each, that kernels take together."""

    first: torch.Tensor  # [M] int32: the first row
    rows: torch.Tensor  # [M] int32; 0: no tile
    sequence: torch.Tensor  # [M] int32: whose row of the tables


class PlacedPlan(NamedTuple):
    """The tensors of an AttentionPlan on its device."""

    positions: torch.Tensor
    reach: torch.Tensor
    slots: torch.Tensor
    row_starts: torch.Tensor
    tables: torch.Tensor


@dataclass
class AttentionPlan:
    """T rows of S sequences, flattened, each sequence's rows being its newest positions.

    The fields are on the host, and `placed` on the device that attends.
    """

    positions: torch.Tensor  # [T] int64, rising by one within a sequence
    reach: torch.Tensor  # [T] int64: the last position that a row sees
    slots: torch.Tensor  # [T] int64: where each row's own key and value go
    row_counts: Sequence[int]  # rows of each sequence, at least one
    row_starts: torch.Tensor  # [S + 1] int64: first row of each sequence, and T
    kv_lens: Sequence[int]  # positions of each sequence, the new rows included
    tables: torch.Tensor  # [S, W] int32: pages of each sequence, in order, padded with 0
    device: torch.device
    window: int | None = None  # keys that a row sees up to its reach, whatever the layer; None: all
    derived: dict[object, object] = field(default_factory=dict)  # what kernels make of it
    _placed: PlacedPlan | None = field(default=None, init=False)

    def move(self, *others: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of the host to the plan's device, and the plan with them, in one copy."""
        if self._placed is not None:
            return to_device(others, self.device)
        own = (self.positions, self.reach, self.slots, self.row_starts, self.tables)
        moved = to_device([*own, *others], self.device)
        self._placed = PlacedPlan(*moved[: len(own)])
        return moved[len(own) :]

    @property
    def placed(self) -> PlacedPlan:
        """The plan on its device."""
        if self._placed is None:
            self.move()
        assert self._placed is not None
        return self._placed

    def first_seen(self, window: int | None) -> torch.Tensor | None:  # [T] int64, where placed is
        """The first position that each row sees in a layer of this window; None: all see all."""
        return _first_seen(self, window)

    def tiles(self, long_rows: int) -> list[tuple[Tiles, int]]:
        """Tiles by the most rows that they have: TILE_ROWS, and `long_rows` for prompts.

        On the plan's device; made once a step and shared by all layers.
        """
        made = self.derived.get(("tiles", long_rows))
        if made is None:
            counts, found = np.asarray(self.row_counts), []
            short = (counts <= FEW_ROWS) | (long_rows <= TILE_ROWS)
            for most, chosen in ((TILE_ROWS, short), (long_rows, ~short)):
                if chosen.any():
                    arrays = cut_into_tiles(counts, np.flatnonzero(chosen), most)
                    found.append((Tiles(*self.move(*map(torch.from_numpy, arrays))), most))
            made = self.derived["tiles", long_rows] = found
        return cast("list[tuple[Tiles, int]]", made)


@dataclass(frozen=True, slots=True)
class WholePlan:
    """S sequences from their first token on, padded at the end to L rows each: T = S · L.

    Nothing is kept for a later step, so no pages are needed. What padding attends to is undefined.
    """

    positions: torch.Tensor  # [T] int64
    sequences: int  # S

    @property
    def placed(self) -> WholePlan:
        """Where everything is already."""
        return self


@dataclass
class RowPlan:
    """T rows, each a sequence of its own: all that is known of them lies on the device.

    No shape depends on what the rows are, so that a step can be captured and replayed.
    """

    positions: torch.Tensor  # [T] int64
    reach: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64
    tables: torch.Tensor  # [T, W] int32
    tile_rows: torch.Tensor  # [T] int32: rows of the tile that begins here; 0: it began before
    window: int | None = None
    derived: dict[object, object] = field(default_factory=dict)

    @property
    def placed(self) -> RowPlan:
        """Where everything is already."""
        return self

    def first_seen(self, window: int | None) -> torch.Tensor | None:  # [T] int64
        """See AttentionPlan."""
        return _first_seen(self, window)

    def tiles(self, long_rows: int) -> list[tuple[Tiles, int]]:
        """See AttentionPlan; a prompt's rows are cut into tiles of as few as all others."""
        if "rows" not in self.derived:
            count, device = self.tile_rows.shape[0], self.tile_rows.device
            self.derived["rows"] = torch.arange(count, dtype=torch.int32, device=device)
        rows = cast(torch.Tensor, self.derived["rows"])
        return [(Tiles(rows, self.tile_rows, rows), TILE_ROWS)]


def cut_into_tiles(
    counts: npt.NDArray[np.int64],  # [S] rows of each sequence
    chosen: npt.NDArray[np.int64],  # the sequences that are cut
    most: int,  # rows of a tile
) -> list[npt.NDArray[np.int32]]:  # [M] each, as in Tiles
    """The tiles of some sequences of a step, in order."""
    starts, own = np.cumsum(counts) - counts, counts[chosen]
    tiles = -(-own // most)
    of = np.repeat(np.arange(len(own)), tiles)
    offset = (np.arange(len(of)) - (np.cumsum(tiles) - tiles)[of]) * most
    first = starts[chosen][of] + offset
    rows = np.minimum(own[of] - offset, most)
    return [array.astype(np.int32) for array in (first, rows, chosen[of])]


def _first_seen(plan: AttentionPlan | RowPlan, window: int | None) -> torch.Tensor | None:
    """Made once a step for each window and shared by all layers.

    A layer's window is counted back from the row itself, the plan's from what the row reaches: in a
    drafted block, whose rows reach its end, those are different places.
    """
    if not plan.window and not window:
        return None
    made = plan.derived.get(("first seen", window))
    if made is None:
        placed = plan.placed
        first = torch.zeros_like(placed.positions)
        if plan.window:
            first = torch.maximum(first, placed.reach + 1 - plan.window)
        if window:
            first = torch.maximum(first, placed.positions + 1 - window)
        made = plan.derived["first seen", window] = first
    return cast(torch.Tensor, made)


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
    return AttentionPlan(
        positions=torch.from_numpy(positions),
        reach=torch.from_numpy(ends[of] - 1 if block else positions),
        slots=torch.from_numpy(slots),
        row_counts=row_counts,
        row_starts=torch.from_numpy(row_starts),
        kv_lens=ends.tolist(),
        tables=torch.from_numpy(tables),
        device=torch.device(device),
        window=window,
    )
