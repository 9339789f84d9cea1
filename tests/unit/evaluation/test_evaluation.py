"""Prompts are read strictly, acceptance is counted rightly, near-ties are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import hf_model

from dspark.engine.llm import Generation
from dspark.errors import ConfigError
from dspark.evaluation.acceptance import report
from dspark.evaluation.losslessness import GreedyReference
from dspark.evaluation.prompts import read_prompts
from dspark.types import VerificationResult


def test_prompts_and_first_turns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n{"prompt": "d"}\n')
    assert read_prompts(path) == ["a", "b", "d"]
    assert read_prompts(path, limit=2) == ["a", "b"]


@pytest.mark.parametrize("line", ["{}", "[]", "not json", '{"turns": []}', '{"prompt": ""}'])
def test_a_line_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=":2:"):
        read_prompts(path)


def generation(steps: list[tuple[int, int]]) -> Generation:
    """A prompt's step, then steps of (verified, accepted)."""
    made = Generation((1,))
    made.add(VerificationResult("a", (1,), 0, 0, 0))
    for verified, accepted in steps:
        tokens = tuple(range(accepted + 1))
        made.add(VerificationResult("a", tokens, 5, verified, accepted))
    return made


def test_accepted_length_leaves_the_prompts_step_out() -> None:
    summary = report([generation([(3, 2), (3, 0)]), generation([(0, 0), (2, 2)])])
    assert summary.accepted_length == pytest.approx((3 + 1 + 1 + 3) / 4)
    low, high = summary.interval
    assert low <= summary.accepted_length <= high
    assert (summary.verified, summary.accepted) == (8, 4)


def test_acceptance_by_position_is_conditional() -> None:
    summary = report([generation([(3, 1), (3, 3), (3, 0), (1, 1)])])
    # position 1: 3 of 4; position 2 was put to the test twice, position 3 once
    assert summary.by_position == pytest.approx((0.75, 0.5, 1.0))
    assert summary.verified_by_position == (4, 2, 1)


def test_the_reference_finds_the_first_difference_and_its_gap() -> None:
    reference = GreedyReference(hf_model(), ())
    prompt = [3, 1, 4]
    want = reference.tokens(prompt, 12)
    assert reference.compare(prompt, want, want).lossless
    wrong = [*want[:5], (want[5] + 1) % 32, *want[6:]]
    comparison = reference.compare(prompt, wrong, want)
    assert comparison.diverges_at == 5
    with torch.inference_mode():
        logits = hf_model()(torch.tensor([[*prompt, *want[:5]]])).logits[0, -1]
    best = logits.topk(2).values
    assert comparison.gap == pytest.approx(float(best[0] - best[1]), abs=1e-5)
    assert not comparison.lossless
    assert not reference.compare(prompt, want[:-1], want).lossless
