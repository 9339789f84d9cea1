"""Between host and device: what a step needs goes over in one copy, what it says comes back in one.

A copy costs more to start than to carry some kilobytes, and one from pageable memory waits for the
work before it. So tensors travel side by side, as the bytes of one pinned buffer. Where both ends
are the same kind of device, nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 16  # bytes, so that every type may begin anywhere


class Packing:
    """Where tensors of some shapes and types lie in a buffer of `size` bytes."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._spans: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in tensors:
            length = tensor.numel() * tensor.element_size()
            self._spans.append((self.size, length, tensor.dtype, tensor.shape))
            self.size += -(-length // _ALIGNMENT) * _ALIGNMENT

    def buffer(self, device: torch.device | str, *, pinned: bool = False) -> torch.Tensor:
        """A new buffer, of whatever its memory held."""
        return torch.empty(self.size, dtype=torch.uint8, device=device, pin_memory=pinned)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a buffer."""
        return [
            buffer[at : at + length].view(dtype).view(shape)
            for at, length, dtype, shape in self._spans
        ]

    def fill(self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Write the tensors into a buffer on their own side; returns it."""
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        return buffer


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the host on `device`, in one copy that nobody waits for.

    The pinned memory is dropped at once: torch does not lend it out again before the copy is over.
    """
    if all(tensor.device.type == device.type for tensor in tensors):
        return list(tensors)
    packing = Packing(tensors)
    staged = packing.fill(packing.buffer("cpu", pinned=device.type == "cuda"), tensors)
    buffer = packing.buffer(device).copy_(staged, non_blocking=True)
    return packing.views(buffer)


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of a device on the host, in one copy: the one place where a step waits for it."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    packing = Packing(tensors)
    packed = packing.fill(packing.buffer(tensors[0].device), tensors)
    arrived = packing.buffer("cpu", pinned=packed.device.type == "cuda")
    arrived.copy_(packed)
    return packing.views(arrived)
