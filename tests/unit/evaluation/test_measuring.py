"""Averages, ratios and held-out calibration: what is compared is comparable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dspark.errors import ConfigError
from dspark.evaluation.held_out import Fit, calibrated_by, cross_fitted, fit, in_halves
from dspark.evaluation.measuring import Arm, measure
from dspark.evaluation.results import Evaluation
from dspark.evaluation.rounds import Rounds
from dspark.evaluation.running import EvaluationPlan
from dspark.types import Scale, VerifyMode

WIDTH = 3
UNIT = Fit(Scale(), (0,) * WIDTH, 0)


def rounds(seed: int, *, prompts: int = 8, each: int = 20, rate: float = 0.6) -> Rounds:
    """Whole blocks whose tokens stand by chance; raw confidences promise too much."""
    rng = np.random.default_rng(seed)
    count = prompts * each
    chance = np.clip(rate + rng.uniform(-0.3, 0.3, size=(count, WIDTH)), 0.02, 0.98)
    stood = np.cumprod(rng.uniform(size=(count, WIDTH)) < chance, axis=1)
    accepted = stood.sum(axis=1)
    logit = np.log(chance / (1 - chance))
    return Rounds(
        prompts,
        np.repeat(np.arange(prompts), each),
        np.full(count, WIDTH),
        accepted,
        accepted + 1,
        (1 / (1 + np.exp(-2.5 * logit))).astype(np.float32),
    )


def arm(name: str, files: dict[str, Rounds]) -> Arm:
    calibrated = calibrated_by(UNIT, files)
    return Arm(
        name, name, "f", "rejection", "confidence head", WIDTH, WIDTH, "a.jsonl", files, calibrated
    )


def test_the_mean_of_files_weighs_files_alike() -> None:
    files = {"small": rounds(1, prompts=3, rate=0.3), "large": rounds(2, prompts=20, rate=0.8)}
    result = measure([arm("a", files)]).arms[0]
    lengths = [file.acceptance.accepted_length for file in result.files.values()]
    macro = result.macro.accepted_length
    assert macro.value == pytest.approx(np.mean([length.value for length in lengths]))
    assert macro.n == sum(length.n for length in lengths)
    assert macro.low is not None
    assert macro.high is not None
    assert macro.low < macro.value < macro.high
    for k, found in enumerate(result.macro.conditional):
        own = [file.acceptance.conditional[k].value for file in result.files.values()]
        assert found.value == pytest.approx(np.mean(own))


def test_a_ratio_is_paired() -> None:
    files = {"a": rounds(3), "b": rounds(4)}
    got = measure([arm("first", files), arm("same", files), arm("worse", {
        "a": rounds(3, rate=0.3), "b": rounds(4, rate=0.3)})])  # fmt: skip
    same, worse = got.ratios
    for figure in (*same.files.values(), same.macro):
        # the two are drawn together, so what is equal is equal in every draw
        assert (figure.value, figure.low, figure.high) == (1.0, 1.0, 1.0)
    assert worse.macro.high is not None
    assert worse.macro.high < 1.0
    assert (same.over, worse.over) == ("first", "first")


def test_equal_prompts_are_in_the_same_half() -> None:
    halves = in_halves({"x": ["a", "b", "c"], "y": ["b", "d", "a"]})
    assert halves["x"].tolist() == [0, 1, 0]
    assert halves["y"].tolist() == [1, 1, 0]


def test_each_half_is_calibrated_by_the_other() -> None:
    files = {"x": rounds(5, prompts=30, each=40), "y": rounds(6, prompts=30, each=40)}
    halves = in_halves({name: [f"{name}{i}" for i in range(30)] for name in files})
    got = cross_fitted(files, halves)
    for own in (0, 1):
        alone = {name: r.of_prompts(halves[name] == own) for name, r in files.items()}
        by_other = calibrated_by(got.fits[own], alone)
        for name, r in files.items():
            mine = halves[name][r.prompt] == own
            assert (got.survivals[name][mine] == by_other.survivals[name]).all()
    # what half 0 is calibrated by does not change with half 0
    spoilt = {
        name: Rounds(
            r.prompts,
            r.prompt,
            r.verified,
            np.where(halves[name][r.prompt] == 0, 0, r.accepted),
            r.tokens,
            r.confidences,
        )
        for name, r in files.items()
    }
    assert cross_fitted(spoilt, halves).fits[0] == got.fits[0]
    assert cross_fitted(spoilt, halves).fits[1] != got.fits[1]


def test_calibration_lowers_the_error_and_keeps_the_order() -> None:
    held_out, files = rounds(7, prompts=40, each=40), {"x": rounds(8, prompts=40, each=40)}
    fitted = fit(held_out)
    assert min(fitted.scale.temperatures) > 1.2  # the confidences above are those of 1 / 2.5
    calibrated = Arm(
        "a", "a", "f", "rejection", "head", WIDTH, WIDTH, "h", files, calibrated_by(fitted, files)
    )
    (result,) = measure([calibrated]).arms[0].files.values()
    first, *_, whole = result.scores
    assert (first.position, whole.position) == (1, 0)
    assert value(whole.calibrated.ece) < value(whole.raw.ece) / 2
    assert value(whole.calibrated.brier) < value(whole.raw.brier)
    # a scale cannot reorder one position; the clip of confidences makes ties at most
    assert first.calibrated.auc.value == pytest.approx(first.raw.auc.value, abs=1e-3)


def test_one_prompt_and_unreached_positions_are_told_as_such() -> None:
    files = {"x": rounds(9, prompts=1, each=2, rate=0.01)}
    (result,) = measure([arm("a", files)]).arms[0].files.values()
    length = result.acceptance.accepted_length
    assert (length.value, length.low, length.high) == (1.0, None, None)
    last = result.acceptance.conditional[-1]
    assert (last.value, last.n) == (None, 0)
    nothing: Evaluation = measure([arm("a", {"x": rounds(9, prompts=1, each=0)})])
    assert nothing.arms[0].files["x"].acceptance.accepted_length.value is None


def test_a_plan_refuses_what_would_not_be_a_comparison() -> None:
    def plan(**changes: Any) -> EvaluationPlan:
        given: dict[str, Any] = {
            "target": "t", "drafters": ("", "other"), "modes": (VerifyMode.COUPLED,),
            "files": {"x": ["a", "b"]}, "held_out": ("h", ["c"]), "tokens": 8,
            "temperature": 0.0, "block_size": 0, "concurrency": 1, "dtype": "float32",
        }  # fmt: skip
        return EvaluationPlan(**{**given, **changes})

    assert plan().answers == 2 * (2 + 1)
    with pytest.raises(ConfigError, match="drafter is given twice"):
        plan(drafters=("d", "d"))
    with pytest.raises(ConfigError, match="mode is given twice"):
        plan(modes=(VerifyMode.COUPLED, VerifyMode.COUPLED))
    with pytest.raises(ConfigError, match="1 prompts to calibrate on are evaluation prompts"):
        plan(held_out=("h", ["c", "b"]))


def value(figure: Any) -> float:
    assert figure.value is not None
    return float(figure.value)
