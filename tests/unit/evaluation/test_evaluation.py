"""Prompts are read strictly, acceptance is counted rightly, near-ties are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import hf_model

from dspark.engine.llm import Generation
from dspark.errors import ConfigError
from dspark.evaluation.losslessness import GreedyReference
from dspark.evaluation.prompts import read_prompts
from dspark.evaluation.rounds import joined, rounds_of
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


def generation(steps: list[tuple[int, int]], *, ended_by_draft: bool = False) -> Generation:
    """A prompt's step, then steps of (verified, accepted)."""
    made = Generation((1,))
    made.add(VerificationResult("a", (1,), 0, 0, 0))
    for number, (verified, accepted) in enumerate(steps, start=1):
        ended = ended_by_draft and number == len(steps)
        tokens = tuple(range(accepted + (not ended)))
        told = accepted if ended else verified
        confidences = tuple(0.5 + k / 10 for k in range(told))
        made.add(VerificationResult("a", tokens, 5, verified, accepted, confidences=confidences))
    return made


def test_rounds_leave_out_the_prompts_step_and_what_followed_the_end() -> None:
    got = rounds_of([generation([(3, 2), (3, 1)], ended_by_draft=True), generation([(2, 2)])], 4)
    assert got.prompts == 2
    assert got.prompt.tolist() == [0, 0, 1]
    assert got.verified.tolist() == [3, 1, 2]  # the two drafted after the end were never judged
    assert got.accepted.tolist() == [2, 1, 2]
    assert got.tokens.tolist() == [3, 1, 3]
    assert got.confidences.shape == (3, 4)
    assert (~np.isnan(got.confidences) == got.judged).all()
    assert got.confidences[0, :3] == pytest.approx([0.5, 0.6, 0.7])


def test_an_answer_without_rounds_still_counts_as_a_prompt() -> None:
    got = rounds_of([generation([]), generation([(1, 0)])])
    assert (got.prompts, got.prompt.tolist()) == (2, [1])
    both = joined([got, rounds_of([generation([(3, 1)])])])
    assert (both.prompts, both.prompt.tolist()) == (3, [1, 2])
    assert both.confidences.shape == (2, 3)
    assert both.of_prompts(np.array([True, True, False])).prompt.tolist() == [1]


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
