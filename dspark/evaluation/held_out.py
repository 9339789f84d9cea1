"""Calibration fitted on other prompts than those it is measured on (paper §3.2.1).

Either a file of prompts is set aside for it, or each half of the prompts is calibrated by what the
other half was fitted to (cross-fitting). A prompt that occurs twice is in one half only.

Shape symbols: P prompts, N rounds, γ block size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.evaluation.rounds import Rounds, joined
from dspark.scheduling.calibration import fit_scale
from dspark.scheduling.survival import survival
from dspark.types import DoubleArray, IntArray, Scale


@dataclass(frozen=True, slots=True)
class Fit:
    """A scale of γ positions."""

    scale: Scale
    # [γ] rounds in which each position was verified; those whose prefix stood tell of it.
    verified: tuple[int, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Survivals of every round by a scale that its prompt had no part in."""

    fits: tuple[Fit, ...]  # one; two if cross-fitted
    survivals: Mapping[str, DoubleArray]  # [N, γ] by prompt file


def fit(rounds: Rounds) -> Fit:
    """The scale of all `rounds`."""
    scale = fit_scale(rounds.confidences, rounds.verified, rounds.accepted)
    verified = tuple(rounds.judged.sum(axis=0).tolist())
    return Fit(scale, verified, int((rounds.verified > 0).sum()))


def calibrated_by(fitted: Fit, files: Mapping[str, Rounds]) -> Calibrated:
    """By a scale from elsewhere."""
    return Calibrated((fitted,), {name: _survivals(r, fitted) for name, r in files.items()})


def cross_fitted(files: Mapping[str, Rounds], halves: Mapping[str, IntArray]) -> Calibrated:
    """Each half by the other; `halves` [P] says by file which prompts are in which, 0 or 1."""
    everything, half = joined(list(files.values())), np.concatenate(list(halves.values()))
    fits = tuple(fit(everything.of_prompts(half != own)) for own in (0, 1))
    survivals = {
        name: np.where(
            (halves[name][rounds.prompt] == 0)[:, None],
            _survivals(rounds, fits[0]),
            _survivals(rounds, fits[1]),
        )
        for name, rounds in files.items()
    }
    return Calibrated(fits, survivals)


def in_halves(files: Mapping[str, Sequence[str]]) -> dict[str, IntArray]:
    """Prompts in turn to either half, by file; equal ones to the same."""
    seen: dict[str, int] = {}
    return {
        name: np.array([seen.setdefault(text, len(seen)) % 2 for text in texts])
        for name, texts in files.items()
    }


def raw_survivals(rounds: Rounds) -> DoubleArray:  # [N, γ]
    """By the confidences as the drafter gives them."""
    return survival(rounds.confidences).astype(np.float64)


def _survivals(rounds: Rounds, fitted: Fit) -> DoubleArray:
    return survival(rounds.confidences, fitted.scale).astype(np.float64)
