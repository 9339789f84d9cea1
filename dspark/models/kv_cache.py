"""A paged KV cache: one store a layer, a page being `PAGE_SIZE` consecutive slots.

Which slot belongs to whom is decided elsewhere (dspark.engine.pages). Page 0 belongs to nobody, so
that slot 0 can pad index tables; it stays zero, since even a masked NaN would spread. What has to
be written but is never read goes to NOWHERE.
"""

from __future__ import annotations

import torch

from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.kernels.dispatch import CpuStore, KVStore, new_store

NOWHERE = 1  # a slot of page 0


class PagedKVCache:
    """Keys and values by layer, allocated on a layer's first write, since widths may differ."""

    def __init__(self, num_pages: int, device: torch.device | str = "cpu") -> None:
        self.num_pages = num_pages
        self.num_slots = num_pages * PAGE_SIZE
        self.device = torch.device(device)
        self._layers: dict[int, KVStore] = {}

    def write(
        self,
        layer: int,
        keys: torch.Tensor,  # [T, G, D]
        values: torch.Tensor,  # [T, G, Dv]
        slots: torch.Tensor,  # [T] int64
    ) -> None:
        """Store rows at `slots`."""
        if layer not in self._layers:
            self.allocate(layer, keys, values)
        self._layers[layer].write(keys, values, slots)

    def allocate(
        self,
        layer: int,
        keys: torch.Tensor,  # [any, G, D]
        values: torch.Tensor,  # [any, G, Dv]
    ) -> None:
        """Make the store of a layer, for rows such as these."""
        self._layers[layer] = new_store(self.num_pages, keys, values, self.device)

    def layer(self, layer: int) -> KVStore:
        """The store of a layer that has been written."""
        return self._layers[layer]

    def pages(self, layer: int, kv_heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of a layer for the C++ operators to write themselves."""
        store = self._layers.get(layer)
        if store is None:
            store = self._layers[layer] = CpuStore(self.num_pages, kv_heads, width)
        assert isinstance(store, CpuStore)
        return store.keys, store.values

    @property
    def allocated(self) -> bool:
        """Whether a forward has been here, so that all layers have their memory."""
        return bool(self._layers)

    def holds(self, layer: int) -> bool:
        """Whether the layer has been written at all."""
        return layer in self._layers
