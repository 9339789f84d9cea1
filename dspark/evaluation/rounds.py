"""Verification rounds as arrays: all that the measures of a drafter are made from.

A round is a step that decided tokens, but for a prompt's own, for which nothing can be drafted.
Where an accepted draft token ended the answer, what was drafted behind it was never put to the
test and does not count as verified.

Shape symbols: N rounds, γ longest block, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.engine.llm import Generation
from dspark.types import DoubleArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds of one run over some prompts, in the order of the prompts."""

    prompts: int  # P, those that had no round included
    prompt: IntArray  # [N] whose, from 0
    verified: IntArray  # [N] draft tokens that the target judged
    accepted: IntArray  # [N] of those
    tokens: IntArray  # [N] that came of it: the accepted and, unless they ended it, one more
    confidences: FloatArray  # [N, γ] P(accepted | all before accepted), raw; NaN: not verified

    @property
    def width(self) -> int:
        """γ"""
        return int(self.confidences.shape[1])

    @property
    def judged(self) -> npt.NDArray[np.bool_]:  # [N, γ]
        """Whether a draft token was verified, wherever the first refusal fell."""
        return np.arange(self.width) < self.verified[:, None]

    @property
    def stood(self) -> npt.NDArray[np.bool_]:  # [N, γ]
        """Whether a draft token and all before it were accepted."""
        return np.arange(self.width) < self.accepted[:, None]

    def by_prompt(self, values: npt.NDArray[np.generic]) -> DoubleArray:  # [N, …] -> [P, …]
        """Sums over each prompt's rounds."""
        sums = np.zeros((self.prompts, *values.shape[1:]))
        np.add.at(sums, self.prompt, values)
        return sums

    def of_prompts(self, chosen: npt.NDArray[np.bool_]) -> Rounds:  # [P]
        """The rounds of some prompts; the others are left without."""
        rows = chosen[self.prompt]
        return Rounds(
            self.prompts,
            self.prompt[rows],
            self.verified[rows],
            self.accepted[rows],
            self.tokens[rows],
            self.confidences[rows],
        )


def rounds_of(generations: Sequence[Generation], block_size: int = 0) -> Rounds:
    """All rounds of answers, one answer a prompt; γ is `block_size`, or what was verified."""
    prompt, verified, accepted, tokens = [], [], [], []
    rows: list[Sequence[float]] = []
    for index, generation in enumerate(generations):
        lengths = zip(generation.verified_lengths, generation.accepted_lengths, strict=True)
        for judged, stood in [*lengths][1:]:
            prompt.append(index)
            verified.append(judged)
            accepted.append(stood)
            tokens.append(stood + 1)
        rows += generation.confidences[1:]
        if len(generation.token_ids) < sum(generation.accepted_lengths) + generation.steps:
            verified[-1] = tokens[-1] = accepted[-1]
    width = max(block_size, *verified, 0)
    confidences = np.full((len(rows), width), np.nan, dtype=np.float32)
    for row, own, length in zip(confidences, rows, verified, strict=True):
        row[:length] = own[:length]
    return Rounds(
        prompts=len(generations),
        prompt=np.array(prompt, dtype=np.int64),
        verified=np.array(verified, dtype=np.int64),
        accepted=np.array(accepted, dtype=np.int64),
        tokens=np.array(tokens, dtype=np.int64),
        confidences=confidences,
    )


def joined(parts: Sequence[Rounds]) -> Rounds:
    """Rounds of several runs, as if their prompts had been one list."""
    starts = np.cumsum([0, *(part.prompts for part in parts)])
    width = max(part.width for part in parts)
    return Rounds(
        int(starts[-1]),
        np.concatenate([part.prompt + s for part, s in zip(parts, starts[:-1], strict=True)]),
        np.concatenate([part.verified for part in parts]),
        np.concatenate([part.accepted for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate(
            [
                np.pad(part.confidences, ((0, 0), (0, width - part.width)), constant_values=np.nan)
                for part in parts
            ]
        ),
    )
