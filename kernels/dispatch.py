"""Which kernels serve a layer's KV cache: chosen once, by device, type and head width.

A store owns one layer's keys and values in the layout of its own kernels, so nothing is ever copied
from one layout to another. What was chosen is logged, once for each kind; where the kernels of a
device do not serve a kind, the torch reference does, with a warning.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch

from dspark.config import kernels_wanted
from dspark.errors import ConfigError
from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan, RowPlan
from dspark.kernels.cpu import operators
from dspark.kernels.reference.paged_attention import paged_attention
from dspark.kernels.reference.row_attention import row_attention

log = logging.getLogger(__name__)

_TRITON_WIDTHS = range(8, 257)
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_SHARING = 16  # query heads of one KV head: a tile of eight rows has them all


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


class TritonStore(RowStore):
    """One row a slot, for the Triton kernels."""

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows at `slots`."""
        from dspark.kernels.triton.cache_write import write_rows

        write_rows(keys, values, self.keys, self.values, slots)

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
        if query.shape[1] > _MOST_SHARING * self.keys.shape[1]:
            _explain(
                f"{query.shape[1]} query heads over {self.keys.shape[1]} KV heads: the torch "
                f"reference, since a tile holds at most {_MOST_SHARING} of one KV head",
                unserved=True,
            )
            return super().attend(
                query, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        from dspark.kernels.triton.attention import paged_attention as triton_attention

        return triton_attention(
            query, self.keys, self.values, plan,
            scale=scale, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip


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
        and kernels_wanted() == "auto"
        and dtype == torch.bfloat16
        and width in operators.HEAD_WIDTHS
        and operators.available()
    )


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device; ConfigError if they are asked for and cannot."""
    wanted = kernels_wanted()
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return False
    if find_spec("triton") is None:
        problem = "Triton is not installed (pip install 'dspark-serve[gpu]')"
    elif device.type != "cuda" and not _interpreted():
        problem = f"Triton has no kernels for {device.type!r} (TRITON_INTERPRET=1 interprets them)"
    else:
        return True
    if wanted == "triton":
        raise ConfigError(f"DSPARK_KERNELS is triton, but {problem}")
    _explain(f"the torch reference serves {device.type}: {problem}", unserved=True)
    return False


def serves_with_triton(
    dtype: torch.dtype, device: torch.device, width: int, heads: int, kv_heads: int
) -> bool:
    """Whether Triton's kernels serve attention of this kind here."""
    return (
        has_triton(device)
        and dtype in TRITON_TYPES
        and width in _TRITON_WIDTHS
        and heads <= _MOST_SHARING * kv_heads
    )


def _interpreted() -> bool:
    from dspark.kernels.triton.launch import INTERPRETED

    return INTERPRETED


def new_store(
    num_pages: int, keys: torch.Tensor, values: torch.Tensor, device: torch.device
) -> KVStore:
    """An empty store for rows such as `keys` [T, G, D] and `values` [T, G, Dv]."""
    _, kv_heads, width = keys.shape
    slots, kind = num_pages * PAGE_SIZE, f"{keys.dtype} heads of {width} on {device.type}"
    if has_triton(device):
        widths = (width, values.shape[2])
        if keys.dtype in TRITON_TYPES and all(w in _TRITON_WIDTHS for w in widths):
            _explain(f"attention of {kind}: Triton kernels")
            return TritonStore(slots, keys, values, device)
        _explain(f"attention of {kind}: the torch reference, for want of kernels", unserved=True)
        return RowStore(slots, keys, values, device)
    if keys.shape == values.shape and has_cpu_operators(keys.dtype, device, width):
        _explain(f"attention of {kind}: C++ operators")
        return CpuStore(num_pages, kv_heads, width)
    _explain(f"attention of {kind}: the torch reference")
    return RowStore(slots, keys, values, device)


@cache
def _explain(choice: str, *, unserved: bool = False) -> None:
    """Say once what was chosen."""
    log.log(logging.WARNING if unserved else logging.INFO, "%s", choice)
