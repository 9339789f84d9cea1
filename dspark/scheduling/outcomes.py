"""What a verifier tells of its blocks: few of many, so that reports stay small."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from dspark.types import BlockOutcomes, Scales, VerificationResult

MOST_BLOCKS = 32  # told of at a time; γ of 7 makes that about a kilobyte
_EVERY = 16  # steps


class OutcomeSample:
    """Verified blocks of the last few steps, each as likely to be kept as any other.

    Which are kept is drawn without a look at them (reservoir sampling), so that what is fitted to
    them is as true of those that were left out.
    """

    def __init__(self, block_size: int) -> None:
        """`block_size`: the drafter's γ; of longer blocks only so much is told."""
        self._block_size = block_size
        self._rng = random.Random(0)
        self._kept: list[VerificationResult] = []
        self._seen = self._steps = 0

    def add(self, results: Iterable[VerificationResult]) -> None:
        """Take in one step."""
        self._steps += 1
        for result in results:
            if not result.confidences:
                continue
            self._seen += 1
            if len(self._kept) < MOST_BLOCKS:
                self._kept.append(result)
            elif (place := self._rng.randrange(self._seen)) < MOST_BLOCKS:
                self._kept[place] = result

    def take(self, scales: Scales) -> BlockOutcomes | None:
        """What to report, when it is time again; `scales` are those in use."""
        if self._steps < _EVERY or not self._kept:
            return None
        size = self._block_size
        confidences = np.full((len(self._kept), size), np.nan, dtype=np.float32)
        for row, result in zip(confidences, self._kept, strict=True):
            told = result.confidences[:size]
            row[: len(told)] = told
        outcomes = BlockOutcomes(
            confidences=confidences,
            verified=np.array([min(len(r.confidences), size) for r in self._kept]),
            accepted=np.array([min(r.accepted, size) for r in self._kept]),
            greedy=np.array([r.greedy for r in self._kept]),
            scales=scales,
        )
        self._kept = []
        self._seen = self._steps = 0
        return outcomes
