"""Context features of all positions that are held, in slots beside the KV cache.

Tapped rows are projected to features when these are wanted, or when many have gathered: the
projection's weights are then read once for all of them. While nothing is drafted, that is most of
what a drafter costs.
"""

from __future__ import annotations

import torch

from dspark.kernels.transfer import to_device
from dspark.models.drafter import FeatureProjection

_GATHERED_ROWS = 64


class FeatureStore:
    """hidden_norm(fc(·)) of tapped rows, by slot."""

    def __init__(self, projection: FeatureProjection, num_slots: int) -> None:
        self._projection = projection
        self._num_slots = num_slots
        self._features: torch.Tensor | None = None  # [slots, d]
        self._taps: list[torch.Tensor] = []  # [T, m·d] of steps that are yet to be projected
        self._slots: list[torch.Tensor] = []  # [T], on the host
        self._gathered = 0

    def keep(self, taps: torch.Tensor, slots: torch.Tensor, *, soon: bool = False) -> None:
        """Take in one step's rows; those of refused drafts are overwritten by later steps.

        `slots` is on the host, here and below. `soon`: they will be wanted after this step, so a
        GPU that is still at it had better be told now.
        """
        self._taps.append(taps)
        self._slots.append(slots)
        self._gathered += len(taps)
        if soon or self._gathered >= _GATHERED_ROWS:
            self._project()

    def rows(self, slots: torch.Tensor) -> torch.Tensor:  # [n] -> [n, d]
        """Features of slots that have been kept."""
        if self._gathered:
            self._project()
        assert self._features is not None, "nothing has been kept"
        (slots,) = to_device([slots], self._features.device)
        return self._features[slots]

    def _project(self) -> None:
        features = self._projection(torch.cat(self._taps))
        if self._features is None:
            self._features = features.new_zeros(self._num_slots, features.shape[-1])
        # Step by step: a slot may have been written more than once, and the last one counts.
        parts = features.split([len(slots) for slots in self._slots])
        for slots, part in zip(to_device(self._slots, features.device), parts, strict=True):
            self._features.index_copy_(0, slots, part)
        self._taps.clear()
        self._slots.clear()
        self._gathered = 0
