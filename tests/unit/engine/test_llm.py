"""`dspark.LLM` from saved models: what users have on disk runs, drafts, and changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import save_models
from helpers.traffic import alike
from transformers import AutoModelForCausalLM

from dspark import LLM, SamplingParams, VerifyMode
from dspark.config import EngineConfig
from dspark.errors import CalibrationError, CheckpointError, ConfigError, InvalidRequestError
from dspark.evaluation.losslessness import GreedyReference
from dspark.models.checkpoint import fingerprint, save_calibration
from dspark.scheduling.calibration import CalibrationTable
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.survival import survival_table
from dspark.types import FloatArray, Scales

PROMPTS = ["hello", "quick brown fox", "answer"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, drafter = save_models(tmp_path_factory.mktemp("models"))
    return str(target), str(drafter)


def llm(folders: tuple[str, str], *, drafted: bool = True, policy: str = "fixed") -> LLM:
    target, drafter = folders
    engine = EngineConfig(policy=policy, max_requests=2, max_waiting=2, cache_tokens=1024)
    return LLM(target, drafter if drafted else "none", dtype="float32", engine=engine)


def test_answers_are_those_of_transformers(folders: tuple[str, str]) -> None:
    model = llm(folders)
    reference = GreedyReference(
        AutoModelForCausalLM.from_pretrained(folders[0]), (model.tokenizer.eos_token_id,)
    )
    assert model.speculative
    for prompt, got in zip(PROMPTS, model.generate(PROMPTS, GREEDY), strict=True):
        assert got.prompt_token_ids == model.chat_prompt(prompt)
        assert got.token_ids == reference.tokens(got.prompt_token_ids, 40)
        assert got.text == model.tokenizer.decode(got.token_ids, skip_special_tokens=True)
        assert got.drafted > 0


def test_a_step_table_is_measured_only_where_it_is_used(folders: tuple[str, str]) -> None:
    assert llm(folders).verifier.table is None
    assert llm(folders, drafted=False, policy="adaptive").verifier.table is None
    adaptive = llm(folders, policy="adaptive")
    assert adaptive.verifier.table is not None
    plain = llm(folders, drafted=False)
    assert not plain.speculative
    sampling = SamplingParams(max_tokens=20, mode=VerifyMode.COUPLED, seed=5)
    got, want = adaptive.generate(PROMPTS, sampling), plain.generate(PROMPTS, sampling)
    assert [g.token_ids for g in got] == [g.token_ids for g in want]


def test_prompt_lookup_needs_no_drafter(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)  # this machine's own times
    looked_up = LLM(
        folders[0],
        "prompt-lookup",
        dtype="float32",
        engine=EngineConfig(max_requests=2, cache_tokens=1024),
    )
    assert looked_up.verifier.table is not None
    prompts = [[5, 6, 7, 8] * 6, [9, 8, 7] * 9]
    sampling = SamplingParams(temperature=0.02, max_tokens=200, mode=VerifyMode.COUPLED, seed=5)
    got = looked_up.generate(prompts, sampling)
    assert sum(g.drafted for g in got) > 0, "INCONCLUSIVE: nothing was drafted"
    want = llm(folders, drafted=False).generate(prompts, sampling)
    assert [g.token_ids for g in got] == [g.token_ids for g in want]
    switched_off = EngineConfig(max_requests=2, cache_tokens=1024, prompt_lookup=False)
    assert not LLM(folders[0], dtype="float32", engine=switched_off).speculative
    with pytest.raises(ConfigError, match="prompt_lookup is false"):
        LLM(folders[0], "prompt-lookup", dtype="float32", engine=switched_off)


def test_more_prompts_than_the_queue_holds_are_answered_in_order(folders: tuple[str, str]) -> None:
    prompts = [[token] * 3 for token in range(2, 11)]
    model = llm(folders, drafted=False)
    together = model.generate(prompts, GREEDY)
    assert [g.prompt_token_ids for g in together] == [tuple(p) for p in prompts]
    assert together[4].token_ids == model.generate([prompts[4]], GREEDY)[0].token_ids


def test_one_set_of_parameters_gives_each_prompt_a_seed_of_its_own(
    folders: tuple[str, str],
) -> None:
    same = llm(folders, drafted=False).generate([[5, 6]] * 2, SamplingParams(max_tokens=20))
    assert same[0].token_ids != same[1].token_ids


def test_each_step_says_what_was_promised_of_its_drafts(folders: tuple[str, str]) -> None:
    for got in llm(folders).generate(PROMPTS, GREEDY):
        assert [len(step) for step in got.confidences[:-1]] == got.verified_lengths[:-1]
        assert any(got.verified_lengths)
        assert all(0.0 < c < 1.0 for step in got.confidences for c in step)
        assert got.accepted_lengths[-1] <= len(got.confidences[-1]) <= got.verified_lengths[-1]


def test_a_drafters_table_is_what_its_plans_start_with(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(folders[1], drafter)
    table = CalibrationTable(alike((2.0, 3.0, 4.0, 5.0)), 4, fingerprint(drafter), 1000)
    save_calibration(drafter, table, 4)
    seen: set[tuple[bool, Scales]] = set()

    def watched(blocks: list[FloatArray], greedy: list[bool], scales: Scales) -> FloatArray:
        seen.update((one, scales) for one in greedy)
        return survival_table(blocks, greedy, scales)

    monkeypatch.setattr("dspark.engine.verification.survival_table", watched)
    llm((folders[0], str(drafter)), policy="adaptive").generate(PROMPTS, GREEDY)
    assert seen == {(True, table.scales)}
    (drafter / "calibration.json").write_text(replace(table, drafter_fingerprint="x").to_json())
    with pytest.raises(CalibrationError, match=r"calibration\.json.*fingerprint 'x'"):
        llm((folders[0], str(drafter)))


def test_what_cannot_be_loaded_or_run_is_said(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder here"):
        LLM(folders[0], str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="drafter configuration"):
        LLM(folders[0], str(tmp_path))
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(str(tmp_path / "missing"))
    with pytest.raises(InvalidRequestError, match="more than the context"):
        llm(folders, drafted=False).generate([[1] * 600])
