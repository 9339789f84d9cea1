"""What `dspark eval` finds, as plain values: the JSON is these fields by their names.

Every Estimate carries its interval and the number of cases it is of: rounds for lengths and for
acceptance by position, draft tokens for shares, errors and bins.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.evaluation.bootstrap import Estimate
from dspark.evaluation.held_out import Fit


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of one prompt file, or the mean over files. Positions count from the first draft token."""

    accepted_length: Estimate  # τ
    accepted_drafts: Estimate  # τ without the target's own token
    conditional: tuple[Estimate, ...]  # [γ]
    survival: tuple[Estimate, ...]  # [γ]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Blocks cut before the first confidence below `threshold`; a round, but for the shares."""

    threshold: float
    kept: Estimate
    accepted: Estimate
    acceptance: Estimate  # accepted / kept
    share_kept: Estimate
    accepted_length: Estimate


@dataclass(frozen=True, slots=True)
class Scores:
    """Of survival probabilities against what was accepted."""

    ece: Estimate
    auc: Estimate
    brier: Estimate


@dataclass(frozen=True, slots=True)
class ScoresAt:
    """Before and after calibration; position 0 stands for all positions together."""

    position: int
    raw: Scores
    calibrated: Scores


@dataclass(frozen=True, slots=True)
class Bin:
    """One bar of a reliability diagram."""

    low: float
    high: float
    predicted: float | None  # mean; None: empty
    observed: Estimate
    share: float | None


@dataclass(frozen=True, slots=True)
class FileResult:
    """One drafter on one file of prompts."""

    prompts: int
    rounds: int
    tokens: int  # that rounds brought; those of prompts' own steps are not among them
    verified: int
    accepted: int
    acceptance: Acceptance
    threshold_sweep: tuple[SweepPoint, ...]
    scores: tuple[ScoresAt, ...]
    reliability_raw: tuple[Bin, ...]
    reliability_calibrated: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the scales that the results are calibrated by come from."""

    source: str
    fits: tuple[Fit, ...]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One drafter in one mode."""

    name: str
    drafter: str
    fingerprint: str
    mode: str
    confidence: str  # what it is read from
    block_size: int
    calibration: Calibration
    files: dict[str, FileResult]
    macro: Acceptance


@dataclass(frozen=True, slots=True)
class Ratio:
    """τ of an arm over that of the first, the same prompts and seeds drawn for both."""

    arm: str
    over: str
    files: dict[str, Estimate]
    macro: Estimate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All of it."""

    arms: tuple[ArmResult, ...]
    ratios: tuple[Ratio, ...]
