"""A device far from the host, for machines that have none: whoever waits for it is caught.

It is torch's `meta`: tensors there have a shape and a type and no values, so that whatever would
read one raises. Copies to and from it are looked at here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAR = torch.device("meta")
_aten = torch.ops.aten


class WaitedError(AssertionError):
    """The host would wait for the device, elsewhere than in `to_host`."""


class Watch(TorchDispatchMode):
    """Counts the copies while it is entered; those that come back bring zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim()}  # numbers mix with all
        if func is _aten.copy_.default and len(devices) == 2:
            return self._copy(*args, **kwargs)
        moves = func is _aten._to_copy.default and kwargs.get("device", None) is not None
        if len(devices) == 2 or (moves and torch.device(kwargs["device"]) not in devices):
            raise WaitedError(f"{func} on {[(tuple(t.shape), t.device) for t in tensors]}")
        return func(*args, **kwargs)

    def _copy(
        self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        if to.device != FAR:
            self.fetched += 1
            return to.zero_()
        if not non_blocking:
            raise WaitedError(f"{tuple(source.shape)} is sent, and waited for")
        self.sent += 1
        return to
