"""Tensors of a paged KV cache: one row a slot, a page being `PAGE_SIZE` consecutive slots.

Which slot belongs to whom is decided elsewhere (dspark.engine.pages). Page 0 belongs to nobody, so
that slot 0 can pad index tables; it stays zero, since even a masked NaN would spread.
"""

from __future__ import annotations

import torch

PAGE_SIZE = 16  # slots


class PagedKVCache:
    """Keys and values by layer, allocated on a layer's first write, since widths may differ."""

    def __init__(self, num_pages: int, device: torch.device | str = "cpu") -> None:
        self.num_slots = num_pages * PAGE_SIZE
        self.device = torch.device(device)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self,
        layer: int,
        keys: torch.Tensor,  # [T, G, D]
        values: torch.Tensor,  # [T, G, Dv]
        slots: torch.Tensor,  # [T] int64
    ) -> None:
        """Store rows at `slots`."""
        if layer not in self._layers:
            self._layers[layer] = (
                keys.new_zeros(self.num_slots, *keys.shape[1:], device=self.device),
                values.new_zeros(self.num_slots, *values.shape[1:], device=self.device),
            )
        k, v = self._layers[layer]
        k.index_copy_(0, slots, keys)
        v.index_copy_(0, slots, values)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [slots, G, D] and values [slots, G, Dv] of a layer that has been written."""
        return self._layers[layer]

    def holds(self, layer: int) -> bool:
        """Whether the layer has been written at all."""
        return layer in self._layers
