"""bf16 linear layers with weights laid out for the CPU's matrix units.

torch re-orders a plain weight at every call; packing it once saves more than half of the time of a
small batch (design's feasibility notes: 16.6 to 6.8 ms a step for one row). Inference only.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W packed by oneDNN; x is bf16 on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Apply the layer."""
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return cast(torch.Tensor, out)


def can_pack(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether packed layers run here: bf16 on a CPU whose torch build has oneDNN and bf16 units."""
    return (
        dtype == torch.bfloat16
        and torch.device(device).type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module` by its packed form."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
