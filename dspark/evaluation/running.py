"""Drafters in the real loop, every drafted token verified: from prompts to rounds.

All arms answer the same prompts with the same seeds. One target is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dspark.config import EngineConfig, ModelConfig
from dspark.engine.llm import LLM, Generation
from dspark.errors import ConfigError
from dspark.evaluation.held_out import Fit, calibrated_by, cross_fitted, fit, in_halves
from dspark.evaluation.measuring import Arm
from dspark.evaluation.rounds import Rounds, rounds_of
from dspark.models.causal_drafter import is_causal_lm
from dspark.models.checkpoint import read_calibration, read_config, save_calibration
from dspark.models.drafter_folder import drafter_folder
from dspark.scheduling.calibration import LEAST_SAMPLES, CalibrationTable, whole_scale
from dspark.types import SamplingParams, Scale, Scales, VerifyMode

SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Who answers what."""

    target: str
    drafters: tuple[str, ...]  # folders; "": the one shipped for the target
    modes: tuple[VerifyMode, ...]
    files: Mapping[str, Sequence[str]]  # prompts by file
    held_out: tuple[str, Sequence[str]] | None  # name and prompts to calibrate on
    tokens: int  # of an answer, at most
    temperature: float
    block_size: int  # 0: the drafter's own
    concurrency: int
    dtype: str

    def __post_init__(self) -> None:
        for kind, given in (("drafter", self.drafters), ("mode", self.modes)):
            if len(set(given)) < len(given):
                raise ConfigError(f"a {kind} is given twice: {', '.join(map(str, given))}")
        if self.held_out is not None:
            asked = {text for texts in self.files.values() for text in texts}
            if shared := asked & set(self.held_out[1]):
                raise ConfigError(
                    f"{len(shared)} prompts to calibrate on are evaluation prompts as well, such "
                    f"as {min(shared)[:60]!r}: calibrate on others"
                )

    @property
    def answers(self) -> int:
        """How many there are to generate."""
        held_out = () if self.held_out is None else self.held_out[1]
        prompts = len(held_out) + sum(map(len, self.files.values()))
        return prompts * len(self.drafters) * len(self.modes)


def run(plan: EvaluationPlan, on_progress: Callable[[int], None] = lambda done: None) -> list[Arm]:
    """Arms by drafter, then by mode; `on_progress` hears of answers as they are made."""
    done = 0

    def count(answers: int) -> None:
        nonlocal done
        done += answers
        on_progress(done)

    return [arm for drafter in plan.drafters for arm in _arms(plan, drafter, count)]


def save_fit(arm: Arm, target: str, *, greedy: bool) -> str:
    """Write the arm's scale beside its drafter's weights; returns the folder.

    It is that of greedy requests or of those that sample; the other stays as it is there.
    ConfigError if it is not of all its positions.
    """
    (fitted,) = arm.calibrated.fits
    folder = drafter_folder(ModelConfig(target=target, drafter=arm.drafter))
    if folder is None:
        raise ConfigError("prompt lookup calibrates itself as it goes: there is nothing to save")
    if arm.block_size != arm.own_block_size:
        raise ConfigError(
            f"a calibration is of whole blocks: this drafter's have {arm.own_block_size} tokens, "
            f"and {arm.block_size} were drafted; leave --block-size out"
        )
    if min(fitted.verified) < LEAST_SAMPLES:
        raise ConfigError(
            f"a calibration takes {LEAST_SAMPLES} verified draft tokens at each position; got "
            f"{', '.join(map(str, fitted.verified))}: calibrate on more prompts or longer answers"
        )
    size = arm.own_block_size
    kept = read_calibration(folder, size)
    plain = whole_scale(Scale(), size)
    scales = Scales(plain, plain) if kept is None else kept.scales
    scales = replace(scales, **{"greedy" if greedy else "sampled": fitted.scale})
    table = CalibrationTable(scales, size, arm.fingerprint, fitted.rounds)
    try:
        save_calibration(folder, table, size)
    except OSError as error:
        raise ConfigError(f"cannot write a calibration to {folder}: {error}") from error
    return str(folder)


def _arms(plan: EvaluationPlan, drafter: str, count: Callable[[int], None]) -> list[Arm]:
    engine = EngineConfig(max_requests=plan.concurrency, policy="fixed", block_size=plan.block_size)
    llm = LLM(plan.target, drafter, dtype=plan.dtype, engine=engine)
    if not llm.speculative:
        raise ConfigError(
            f"nothing drafts for {plan.target!r} with --drafter {drafter!r}: name a drafter"
        )
    arms = []
    for mode in plan.modes:
        sampling = SamplingParams(temperature=plan.temperature, max_tokens=plan.tokens, mode=mode)

        def rounds(texts: Sequence[str], sampling: SamplingParams = sampling) -> Rounds:
            answers = _answers(llm, texts, sampling, plan.concurrency, count)
            return rounds_of(answers, llm.block_size)

        files = {name: rounds(texts) for name, texts in plan.files.items()}
        fitted: Fit | None = None
        if plan.held_out is not None:
            fitted = fit(rounds(plan.held_out[1]))
        arms.append(
            Arm(
                name=_name(plan, drafter, mode),
                drafter=drafter,
                fingerprint=llm.drafter_fingerprint,
                mode=mode,
                confidence=_confidence(plan.target, drafter),
                block_size=llm.block_size,
                own_block_size=llm.own_block_size,
                calibrated_on=(
                    "the other half of the prompts (cross-fitting)"
                    if plan.held_out is None
                    else plan.held_out[0]
                ),
                files=files,
                calibrated=(
                    cross_fitted(files, in_halves(plan.files))
                    if fitted is None
                    else calibrated_by(fitted, files)
                ),
            )
        )
    return arms


def _confidence(target: str, drafter: str) -> str:
    """What a drafter's confidences are read from."""
    folder = drafter_folder(ModelConfig(target=target, drafter=drafter))
    if folder is None:
        return "fate of earlier lookups"
    has_head = not is_causal_lm(folder) and read_config(folder).enable_confidence_head
    return "confidence head" if has_head else "likeliest token"


def _name(plan: EvaluationPlan, drafter: str, mode: VerifyMode) -> str:
    name = drafter or SHIPPED
    return name if len(plan.modes) == 1 else f"{name}, {mode}"


def _answers(
    llm: LLM,
    texts: Sequence[str],
    sampling: SamplingParams,
    concurrency: int,
    count: Callable[[int], None],
) -> list[Generation]:
    """In order; prompt i has the seed i, whoever is answered beside it."""
    seeded = [replace(sampling, seed=sampling.seed + i) for i in range(len(texts))]
    generations = []
    for start in range(0, len(texts), concurrency):
        part = slice(start, start + concurrency)
        generations += llm.generate(texts[part], seeded[part])
        count(len(texts[part]))
    return generations
