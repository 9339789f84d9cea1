"""What scales are worth: the ECE of survivals by several of them, on the same rounds.

    python benchmarks/calibration.py --prompts gsm8k.jsonl --prompts humaneval.jsonl

Greedy and at temperature 1 (`rejection`), whole blocks, the mean over files: raw; by a scale for
that kind of request, and by one for both, each fitted on the other half of the prompts; by the
table beside the drafter's weights; and what a perfect forecast would measure, its outcomes drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import typer

from dspark.config import ModelConfig
from dspark.evaluation.held_out import Calibrated, cross_fitted, in_halves, raw_survivals
from dspark.evaluation.prompts import read_files
from dspark.evaluation.rounds import Rounds, joined
from dspark.evaluation.running import EvaluationPlan, run
from dspark.models.checkpoint import read_calibration
from dspark.models.drafter_folder import drafter_folder
from dspark.scheduling.calibration import expected_calibration_error
from dspark.scheduling.survival import survival
from dspark.types import DoubleArray, VerifyMode


def error(files: Mapping[str, Rounds], survivals: Mapping[str, DoubleArray]) -> float:
    """Mean of the files' ECE, all positions together."""
    return float(
        np.mean(
            [
                expected_calibration_error(survivals[name][r.judged], r.stood[r.judged])
                for name, r in files.items()
            ]
        )
    )


def perfect(files: Mapping[str, Rounds], survivals: Mapping[str, DoubleArray]) -> float:
    """The ECE of survivals that are true: what noise alone makes of it."""
    rng = np.random.default_rng(0)
    errors = []
    for name, rounds in files.items():
        told = survivals[name]
        chances = told / np.maximum(
            np.pad(told, ((0, 0), (1, 0)), constant_values=1.0)[:, :-1], 1e-30
        )
        drawn = np.cumprod(rng.random(told.shape) < chances, axis=1).astype(np.bool_)
        errors.append(expected_calibration_error(told[rounds.judged], drawn[rounds.judged]))
    return float(np.mean(errors))


def main(
    prompts: list[Path] = typer.Option(..., help="As for dspark eval; repeat for several."),
    limit: int = typer.Option(0, min=0, help="Use the first N prompts of each file; 0: all."),
    target: str = typer.Option("smollm2-135m"),
    drafter: str = typer.Option("", help="Default: the one shipped for the target."),
    tokens: int = typer.Option(128, min=2),
    concurrency: int = typer.Option(16, min=1),
) -> None:
    """Print a row for each kind of request."""
    files = read_files(prompts, limit)
    halves = in_halves(files)
    arms = {}
    for temperature in (0.0, 1.0):
        plan = EvaluationPlan(
            target, (drafter,), (VerifyMode.REJECTION,), files, None,
            tokens, temperature, 0, concurrency, "bfloat16",
        )  # fmt: skip
        (arms[temperature],) = run(plan)
    both = cross_fitted(
        {name: joined([arm.files[name] for arm in arms.values()]) for name in files},
        {name: np.concatenate([half, half]) for name, half in halves.items()},
    )
    folder = drafter_folder(ModelConfig(target=target, drafter=drafter))
    table = None if folder is None else read_calibration(folder, arms[0.0].own_block_size)
    print("| temperature | raw | own scale | one for both kinds | table of the weights | perfect |")
    print("|---|---|---|---|---|---|")
    for place, (temperature, arm) in enumerate(arms.items()):
        told: dict[str, Mapping[str, DoubleArray]] = {
            "raw": {name: raw_survivals(rounds) for name, rounds in arm.files.items()},
            "own": arm.calibrated.survivals,
            "both": _part(both, arm.files, first=place == 0),
        }
        if table is not None:
            scale = table.scales.sampled if temperature else table.scales.greedy
            told["table"] = {
                name: survival(rounds.confidences, scale).astype(np.float64)
                for name, rounds in arm.files.items()
            }
        cells = [error(arm.files, survivals) for survivals in told.values()]
        cells += [np.nan] * (table is None) + [perfect(arm.files, arm.calibrated.survivals)]
        print(f"| {temperature:g} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


def _part(both: Calibrated, files: Mapping[str, Rounds], *, first: bool) -> dict[str, DoubleArray]:
    """Of rounds of two runs, those of one."""
    counts = {name: len(rounds.prompt) for name, rounds in files.items()}
    return {
        name: rows[: counts[name]] if first else rows[-counts[name] :]
        for name, rows in both.survivals.items()
    }


if __name__ == "__main__":
    typer.run(main)
