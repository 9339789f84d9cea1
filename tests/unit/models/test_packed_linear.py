"""Packed layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspark.models.packed_linear import PackedLinear, can_pack, pack_linears


@pytest.mark.skipif(
    not can_pack(torch.bfloat16, "cpu"), reason="this processor or torch build has no packed bf16"
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_packing_changes_nothing_but_rounding(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias).bfloat16()
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16)
    model = nn.Sequential(linear, nn.SiLU())
    want = model(x)
    pack_linears(model)
    assert isinstance(model[0], PackedLinear)
    # sums in fp32 either way; results are rounded to bf16 once
    torch.testing.assert_close(model(x), want, atol=2e-2, rtol=2e-2)


def test_other_precisions_and_devices_are_left_alone() -> None:
    assert not can_pack(torch.float32, "cpu")
    assert not can_pack(torch.bfloat16, "cuda")
