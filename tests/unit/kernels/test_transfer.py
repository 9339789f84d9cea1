"""Tensors packed side by side are what they were, and go to a device in one copy."""

from __future__ import annotations

import pytest
import torch
from helpers.far_device import FAR, WaitedError, Watch
from hypothesis import given
from hypothesis import strategies as st

from dspark.kernels.transfer import Packing, to_device, to_host

TYPES = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.bool)
shapes = st.lists(
    st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6
)


def tensors_of(shapes: list[tuple[torch.dtype, list[int]]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-99, 99, shape, generator=generator).to(dtype) for dtype, shape in shapes]


@given(shapes)
def test_what_is_packed_comes_out_again(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = tensors_of(shapes)
    packing = Packing(tensors)
    views = packing.views(packing.fill(packing.buffer("cpu"), tensors))
    for view, tensor in zip(views, tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)


@given(shapes)
def test_one_copy_there_and_one_back(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = tensors_of([*shapes, (torch.int64, [3])])
    with Watch() as watch:
        there = to_device(tensors, FAR)
        back = to_host(there)
    assert (watch.sent, watch.fetched) == (1, 1)
    for tensor, far, near in zip(tensors, there, back, strict=True):
        assert far.device == FAR
        assert far.dtype == near.dtype == tensor.dtype
        assert far.shape == near.shape == tensor.shape


def test_nothing_moves_where_it_is_already() -> None:
    tensors = tensors_of([(torch.int64, [3]), (torch.float32, [2, 2])])
    moved = to_device(tensors, torch.device("cpu"))
    assert all(a is b for a, b in zip(moved, tensors, strict=True))
    assert all(a is b for a, b in zip(to_host(tensors), tensors, strict=True))


def test_a_host_that_waits_is_caught() -> None:
    far, near = torch.zeros(3, device=FAR), torch.zeros(3)
    for wait in (
        lambda: near.to(FAR),
        lambda: far.copy_(near),
        lambda: far[torch.zeros(2, dtype=torch.int64)],
        lambda: far + near,
    ):
        with pytest.raises(WaitedError), Watch():
            wait()
    for read in (far.tolist, lambda: bool(far.any()), lambda: int(far[0]), far.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError, WaitedError)), Watch():
            read()
