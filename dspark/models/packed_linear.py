"""bf16 linear layers with weights laid out once for the CPU's dot product, for inference only.

torch re-orders a plain weight at every call. Ours (kernels/cpu) reads weights in one stream, and a
row of its result does not depend on the rows beside it; oneDNN's is the fallback where the C++
operators cannot be had.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from dspark.kernels.cpu import operators


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W packed; x is bf16 on the CPU."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> None:
        """`dtype`: of the result, bf16 or fp32."""
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self._pack(linear.weight.detach(), bias, dtype)

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
        """The layer of a weight [out, in] alone."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._pack(weight.detach(), None, dtype)
        return made

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self._own = operators.available() and self.in_features % 2 == 0
        if self._own:
            self.packed = operators.pack_linear(weight)
            self.bias = None if bias is None else operators.pack_bias(bias)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        """Apply the layer."""
        if not self._own:
            out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return cast(torch.Tensor, out).to(self.dtype)
        flat = x.reshape(-1, self.in_features).contiguous()
        out = operators.linear(flat, self.packed, self.bias, self.out_features, self.dtype)
        return out.view(*x.shape[:-1], self.out_features)


def can_pack(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether packed layers run here: bf16 on a CPU with bf16 units."""
    return (
        dtype == torch.bfloat16
        and torch.device(device).type == "cpu"
        and (
            operators.available()
            or (
                torch.backends.mkldnn.is_available()
                and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
            )
        )
    )


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module` by its packed form."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
