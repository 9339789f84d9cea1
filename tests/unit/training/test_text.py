"""Self-written text: a run that was cut goes on, and keeps only whole conversations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import tiny_engine, tiny_target
from helpers.tokenizer import byte_level, without_template
from hypothesis import given
from hypothesis import strategies as st

from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError
from dspark.training.text import TextConfig, read_conversations, until_it_repeats, write_text

CONFIG = TextConfig(tokens=600, max_instruction=24, max_answer=32, seed=3)


def writer() -> VerifierEngine:
    target = tiny_target(vocab=len(byte_level()))
    engine = tiny_engine(target, max_requests=8, max_waiting=16, prefill_chunk_tokens=64)
    # many stop tokens, so that a model that knows no text ends its turns now and then
    engine.eos_token_ids = tuple(range(40))
    return engine


def test_conversations_are_written_up_to_the_goal(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    seen: list[int] = []
    done = write_text(
        writer(), byte_level(), CONFIG, path, on_progress=lambda now, total: seen.append(now)
    )
    conversations = read_conversations(path)
    assert done == sum(len(c.answer) for c in conversations) >= CONFIG.tokens
    assert seen == sorted(seen)
    assert seen[-1] == CONFIG.tokens
    assert {c.temperature for c in conversations} <= set(CONFIG.temperatures)
    assert len({c.prompt for c in conversations}) == len(conversations)


def test_a_run_that_was_cut_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    write_text(writer(), byte_level(), CONFIG, path, max_seconds=0.0)
    first = read_conversations(path)
    assert len(first) == 1
    with path.open("a") as out:
        out.write('{"prompt": [1, 2')  # what a kill leaves
    write_text(writer(), byte_level(), CONFIG, path)
    after = read_conversations(path)
    assert after[:1] == first
    assert sum(len(c.answer) for c in after) >= CONFIG.tokens


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match="template"):
        write_text(writer(), without_template(), CONFIG, tmp_path / "text.jsonl")


def test_nothing_is_asked_twice_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    write_text(writer(), byte_level(), CONFIG, path)
    more = replace(CONFIG, tokens=3 * CONFIG.tokens)
    write_text(writer(), byte_level(), more, path)
    prompts = [c.prompt for c in read_conversations(path)]
    assert len(set(prompts)) == len(prompts)


TOKENS = st.lists(st.integers(0, 3), max_size=60)


@given(TOKENS)
def test_what_is_cut_off_said_nothing_new(tokens: list[int]) -> None:
    kept = until_it_repeats(tokens)
    assert tokens[: len(kept)] == kept
    if len(kept) < len(tokens):
        # the rest goes on with a period of what was kept
        assert any(
            all(tokens[i] == tokens[i - period] for i in range(len(kept), len(tokens)))
            for period in range(1, len(kept) // 3 + 1)
        )


@given(TOKENS, st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(4, 9))
def test_a_loop_is_cut_after_its_third_turn(before: list[int], turn: list[int], times: int) -> None:
    tokens = [*before, 10, *turn * times]
    kept = until_it_repeats(tokens)
    assert len(kept) <= len(before) + 1 + 3 * len(turn)


def test_text_without_a_loop_is_kept() -> None:
    tokens = [1, 2, 3, 1, 2, 3, 4, 4, 5]
    assert until_it_repeats(tokens) == tokens
    assert until_it_repeats([]) == []
