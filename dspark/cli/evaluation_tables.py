"""What `dspark eval` shows in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from dspark.evaluation.bootstrap import Estimate
from dspark.evaluation.results import ArmResult, Evaluation


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """Lengths, ratios where there is something to compare, and positions."""
    yield _lengths(evaluation)
    if evaluation.ratios:
        yield _ratios(evaluation)
    for arm in evaluation.arms:
        for file in arm.files:
            yield _positions(arm, file)


def _lengths(evaluation: Evaluation) -> Table:
    table = _table("accepted length, 95 % intervals over prompts", "drafter", "prompts of")
    for heading in ("τ", "draft tokens of it", "prompts", "rounds"):
        table.add_column(heading, justify="right")
    for arm in evaluation.arms:
        for name, result in arm.files.items():
            length, drafts = result.acceptance.accepted_length, result.acceptance.accepted_drafts
            counts = (str(result.prompts), str(result.rounds))
            table.add_row(escape(arm.name), escape(name), str(length), str(drafts), *counts)
        if len(arm.files) > 1:
            length, drafts = arm.macro.accepted_length, arm.macro.accepted_drafts
            prompts = sum(result.prompts for result in arm.files.values())
            counts = (str(prompts), str(length.n))
            table.add_row(escape(arm.name), "mean of files", str(length), str(drafts), *counts)
    return table


def _ratios(evaluation: Evaluation) -> Table:
    table = _table("τ over the first drafter's, paired", "drafter", "prompts of")
    table.add_column("ratio", justify="right")
    for ratio in evaluation.ratios:
        for name, figure in ratio.files.items():
            table.add_row(escape(ratio.arm), escape(name), str(figure))
        if len(ratio.files) > 1:
            table.add_row(escape(ratio.arm), "mean of files", str(ratio.macro))
    return table


def _positions(arm: ArmResult, file: str) -> Table:
    result = arm.files[file]
    table = Table(
        title=escape(f"{arm.name} on {file}"),
        caption=escape(f"calibrated on {arm.calibration.source}"),
    )
    for heading in ("position", "acceptance", "n", "survival", "ECE raw", "ECE fitted", "AUC"):
        table.add_column(heading, justify="right")
    acceptance = result.acceptance
    rows = zip(acceptance.conditional, acceptance.survival, result.scores, strict=False)
    for conditional, survival, scores in rows:
        table.add_row(
            str(scores.position),
            str(conditional),
            str(conditional.n),
            _short(survival),
            _short(scores.raw.ece),
            _short(scores.calibrated.ece),
            _short(scores.calibrated.auc),
        )
    return table


def _table(title: str, *labels: str) -> Table:
    table = Table(title=title)
    for label in labels:
        table.add_column(label)
    return table


def _short(figure: Estimate) -> str:
    return "–" if figure.value is None else f"{figure.value:.3f}"
