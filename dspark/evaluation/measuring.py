"""From rounds to results: every measure of every arm and file, with its interval.

Files are drawn from apart, each with its own prompts, and averages over files are of their draws:
a macro-average's interval follows from all of them. Arms share the draws, so ratios are paired.

Statistics are arrays [1+B, …], as dspark.evaluation.bootstrap has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.evaluation.acceptance import (
    THRESHOLDS,
    accepted_drafts,
    accepted_length,
    conditional_acceptance,
    prefix_survival,
    threshold_sweep,
    times_tested,
)
from dspark.evaluation.bootstrap import Estimate, estimate, estimates, prompt_weights, ratio
from dspark.evaluation.held_out import Calibrated, raw_survivals
from dspark.evaluation.reliability import (
    Forecasts,
    auc,
    brier_score,
    calibration_error,
    forecasts,
    reliability_diagram,
)
from dspark.evaluation.results import (
    Acceptance,
    ArmResult,
    Bin,
    Calibration,
    Evaluation,
    FileResult,
    Ratio,
    Scores,
    ScoresAt,
    SweepPoint,
)
from dspark.evaluation.rounds import Rounds
from dspark.types import DoubleArray


@dataclass(frozen=True, slots=True)
class Arm:
    """One drafter in one mode, and what it did: rounds by prompt file, the same files in each."""

    name: str
    drafter: str
    fingerprint: str
    mode: str
    confidence: str
    block_size: int
    own_block_size: int  # of the drafter; 0 where it has none
    calibrated_on: str
    files: Mapping[str, Rounds]
    calibrated: Calibrated


def measure(arms: Sequence[Arm]) -> Evaluation:
    """All results; ratios are over the first arm."""
    prompts = {name: rounds.prompts for name, rounds in arms[0].files.items()}
    weights = {name: prompt_weights(n, seed) for seed, (name, n) in enumerate(prompts.items())}
    first, *others = arms
    return Evaluation(
        arms=tuple(_arm(arm, weights) for arm in arms),
        ratios=tuple(_ratio(arm, first, weights) for arm in others),
    )


def _arm(arm: Arm, weights: Mapping[str, DoubleArray]) -> ArmResult:
    return ArmResult(
        name=arm.name,
        drafter=arm.drafter,
        fingerprint=arm.fingerprint,
        mode=arm.mode,
        confidence=arm.confidence,
        block_size=arm.block_size,
        calibration=Calibration(arm.calibrated_on, arm.calibrated.fits),
        files={
            name: _file(rounds, arm.calibrated.survivals[name], weights[name])
            for name, rounds in arm.files.items()
        },
        macro=_acceptance(arm.files, weights),
    )


def _file(rounds: Rounds, calibrated: DoubleArray, weights: DoubleArray) -> FileResult:
    raw = raw_survivals(rounds)
    positions: list[int | None] = [*range(rounds.width), None]
    return FileResult(
        prompts=rounds.prompts,
        rounds=len(rounds.prompt),
        tokens=int(rounds.tokens.sum()),
        verified=int(rounds.verified.sum()),
        accepted=int(rounds.accepted.sum()),
        acceptance=_acceptance({"": rounds}, {"": weights}),
        threshold_sweep=_sweep(rounds, weights),
        scores=tuple(
            ScoresAt(
                0 if position is None else position + 1,
                raw=_scores(forecasts(rounds, raw, position), weights),
                calibrated=_scores(forecasts(rounds, calibrated, position), weights),
            )
            for position in positions
        ),
        reliability_raw=_bins(forecasts(rounds, raw), weights),
        reliability_calibrated=_bins(forecasts(rounds, calibrated), weights),
    )


def _acceptance(files: Mapping[str, Rounds], weights: Mapping[str, DoubleArray]) -> Acceptance:
    def averaged(measure: Callable[[Rounds, DoubleArray], DoubleArray]) -> DoubleArray:
        return _mean([measure(rounds, weights[name]) for name, rounds in files.items()])

    tested = np.sum([times_tested(rounds) for rounds in files.values()], axis=0)
    rounds = sum(len(rounds.prompt) for rounds in files.values())
    return Acceptance(
        accepted_length=estimate(averaged(accepted_length), rounds),
        accepted_drafts=estimate(averaged(accepted_drafts), rounds),
        conditional=estimates(averaged(conditional_acceptance), tested),
        survival=estimates(averaged(_survival), tested),
    )


def _survival(rounds: Rounds, weights: DoubleArray) -> DoubleArray:  # [1+B, γ]
    return prefix_survival(conditional_acceptance(rounds, weights))


def _mean(statistics: Sequence[DoubleArray]) -> DoubleArray:
    """Over files, but for those in which the sample itself cannot tell it."""
    of_files = np.stack(statistics)  # [F, 1+B, …]
    told = ~np.isnan(of_files[:, 0])  # [F, …]
    sums = np.where(told[:, None], of_files, 0.0).sum(axis=0)
    count = told.sum(axis=0)
    return ratio(sums, np.broadcast_to(count, sums.shape))


def _sweep(rounds: Rounds, weights: DoubleArray) -> tuple[SweepPoint, ...]:
    sweep = threshold_sweep(rounds, weights)
    count, whole = np.full(len(THRESHOLDS), len(rounds.prompt)), np.full_like(sweep.n, sweep.n[0])
    columns = (
        estimates(sweep.kept, count),
        estimates(sweep.accepted, count),
        estimates(sweep.acceptance, sweep.n),
        estimates(sweep.share_kept, whole),
        estimates(sweep.accepted_length, count),
    )
    return tuple(SweepPoint(t, *row) for t, *row in zip(THRESHOLDS, *columns, strict=True))


def _scores(given: Forecasts, weights: DoubleArray) -> Scores:
    n = len(given.prompt)
    return Scores(
        ece=estimate(calibration_error(given, weights), n),
        auc=estimate(auc(given, weights), n),
        brier=estimate(brier_score(given, weights), n),
    )


def _bins(given: Forecasts, weights: DoubleArray) -> tuple[Bin, ...]:
    diagram = reliability_diagram(given, weights)
    edges = np.linspace(0.0, 1.0, len(diagram.n) + 1)
    observed = estimates(diagram.observed, diagram.n)
    return tuple(
        Bin(
            low=float(edges[e]),
            high=float(edges[e + 1]),
            predicted=None if not diagram.n[e] else float(diagram.predicted[0, e]),
            observed=observed[e],
            share=None if not diagram.n.any() else float(diagram.share[0, e]),
        )
        for e in range(len(diagram.n))
    )


def _ratio(arm: Arm, first: Arm, weights: Mapping[str, DoubleArray]) -> Ratio:
    def lengths(of: Arm) -> dict[str, DoubleArray]:
        return {name: accepted_length(rounds, weights[name]) for name, rounds in of.files.items()}

    own, base = lengths(arm), lengths(first)
    count = {name: len(rounds.prompt) for name, rounds in arm.files.items()}

    def of(a: DoubleArray, b: DoubleArray, n: int) -> Estimate:
        return estimate(a / b, n)  # a round brings at least a token: b ≥ 1, or NaN

    return Ratio(
        arm=arm.name,
        over=first.name,
        files={name: of(own[name], base[name], count[name]) for name in own},
        macro=of(_mean([*own.values()]), _mean([*base.values()]), sum(count.values())),
    )
