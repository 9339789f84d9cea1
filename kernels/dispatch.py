"""Which kernels serve a layer's KV cache: chosen once, by device, type and head width.

A store owns one layer's keys and values in the layout of its own kernels, so nothing is ever copied
from one layout to another.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan, RowPlan
from dspark.kernels.cpu import operators
from dspark.kernels.reference.paged_attention import paged_attention
from dspark.kernels.reference.row_attention import row_attention


class KVStore(Protocol):
    """Keys and values of one layer, in pages."""

    def write(
        self,
        keys: torch.Tensor,  # [T, G, D]
        values: torch.Tensor,  # [T, G, Dv]
        slots: torch.Tensor,  # [T] int64
    ) -> None:
        """Store rows at `slots`."""

    def attend(
        self,
        query: torch.Tensor,  # [T, H, D]
        plan: AttentionPlan | RowPlan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # [T, H, Dv]
        """Attention of the plan's rows over what has been written."""


class RowStore:
    """One row a slot: the torch reference, for any device, type and width."""

    def __init__(
        self, num_slots: int, keys: torch.Tensor, values: torch.Tensor, device: torch.device
    ) -> None:
        self.keys = keys.new_zeros(num_slots, *keys.shape[1:], device=device)
        self.values = values.new_zeros(num_slots, *values.shape[1:], device=device)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows at `slots`."""
        self.keys.index_copy_(0, slots, keys)
        self.values.index_copy_(0, slots, values)

    def attend(
        self,
        query: torch.Tensor,
        plan: AttentionPlan | RowPlan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the plan's rows over what has been written."""
        keys, values = self.keys, self.values
        if isinstance(plan, RowPlan):
            return row_attention(
                query, keys, values, plan,
                scale=scale, window=window, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        return paged_attention(
            query, keys, values, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
        )


class CpuStore:
    """Pages laid out for the C++ operators: bf16."""

    def __init__(self, num_pages: int, kv_heads: int, width: int) -> None:
        self.keys = operators.new_pages(num_pages, kv_heads, width)
        self.values = operators.new_pages(num_pages, kv_heads, width)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows at `slots`."""
        operators.write(keys.contiguous(), values.contiguous(), self.keys, self.values, slots)

    def attend(
        self,
        query: torch.Tensor,
        plan: AttentionPlan | RowPlan,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the plan's rows over what has been written."""
        assert isinstance(plan, AttentionPlan)  # rows alone are for devices that replay steps
        rows, heads, width = query.shape
        out = operators.attention(
            query.reshape(rows, heads * width),
            self.keys,
            self.values,
            plan,
            heads,
            width,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.float().contiguous(),
        )
        return out.view(rows, heads, width)


def has_cpu_operators(dtype: torch.dtype, device: torch.device, width: int) -> bool:
    """Whether the C++ operators serve attention of this kind here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and width in operators.HEAD_WIDTHS
        and operators.available()
    )


def new_store(
    num_pages: int, keys: torch.Tensor, values: torch.Tensor, device: torch.device
) -> KVStore:
    """An empty store for rows such as `keys` [T, G, D] and `values` [T, G, Dv]."""
    _, kv_heads, width = keys.shape
    if keys.shape == values.shape and has_cpu_operators(keys.dtype, device, width):
        return CpuStore(num_pages, kv_heads, width)
    return RowStore(num_pages * PAGE_SIZE, keys, values, device)
