"""An exponential moving average of a drafter's weights: what is evaluated, saved and served.

While the learning rate is high, weights wander around what they tend to; their average does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_YOUNG = 10  # updates: until the average is older, it forgets its first values faster


class AveragedWeights:
    """Follows a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """`decay` 0: no averaging, the newest weights."""
        self._parameters = list(module.parameters())
        self._decay = decay
        self._average = [p.detach().clone() for p in self._parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + _YOUNG))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the average's weights meanwhile."""
        own = [p.data for p in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._average, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    def state(self) -> dict[str, Any]:
        """To be saved."""
        return {"average": self._average, "updates": self._updates}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._average, self._updates = list(state["average"]), int(state["updates"])
