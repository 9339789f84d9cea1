"""Training text, written by the target itself (design §8): no data set, and no law but its own.

Shown the opening of a user turn, an instruction-tuned model writes an instruction; asked it, it
writes the answer. Answers are drawn at several temperatures, since a drafter will meet them all.
Conversations are appended to a file as they finish, so a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError
from dspark.training.openings import OPENINGS
from dspark.types import FinishReason, Request, SamplingParams

_SLOT = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the user's text in a rendered template
MIN_INSTRUCTION_TOKENS = 3
MIN_ANSWER_TOKENS = 16
_LONGEST_PERIOD = 64  # tokens of what a loop repeats
_REPETITIONS = 3  # that are kept: what a drafter has to learn of a loop, it learns from these


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user turn and the answer to it."""

    prompt: tuple[int, ...]  # the whole prompt, template included
    answer: tuple[int, ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What to write. Lengths in tokens."""

    tokens: int = 1_000_000  # answer tokens in all
    max_instruction: int = 128
    max_answer: int = 384
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)  # of answers; drawn from evenly
    opening_share: float = 0.5  # instructions that begin with one of OPENINGS
    seed: int = 0


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations of a file; a last line that was cut in half is left out."""
    out = []
    with path.open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                break
            raw = json.loads(line)
            out.append(Conversation(tuple(raw["prompt"]), tuple(raw["answer"]), raw["temperature"]))
    return out


def write_conversations(conversations: Iterable[Conversation], path: Path) -> None:
    """A file of these and no others."""
    path.write_text("".join(map(_line, conversations)))


def tokens_written(path: Path) -> int:
    """Answer tokens that a file holds."""
    return sum(len(c.answer) for c in read_conversations(path)) if path.exists() else 0


def write_text(
    engine: VerifierEngine,
    tokenizer: Any,
    config: TextConfig,
    path: Path,
    *,
    max_seconds: float = float("inf"),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Append conversations until `config.tokens` answer tokens are there; returns how many are."""
    had = read_conversations(path) if path.exists() else []
    write_conversations(had, path)  # drops a line that was cut
    done = sum(len(c.answer) for c in had)
    stop_at = time.monotonic() + max_seconds
    if done >= config.tokens:
        return done
    with path.open("a") as out:
        for conversation in _conversations(engine, tokenizer, config, had):
            out.write(_line(conversation))
            done += len(conversation.answer)
            on_progress(min(done, config.tokens), config.tokens)
            if done >= config.tokens or time.monotonic() >= stop_at:
                break
    return done


def until_it_repeats(tokens: list[int]) -> list[int]:
    """An answer up to where it does nothing any more but say the same again."""
    ids = np.asarray(tokens)
    kept = len(ids)
    for period in range(1, min(_LONGEST_PERIOD, len(ids) // _REPETITIONS) + 1):
        same = ids[period:] == ids[:-period]
        run = len(same) if same.all() else int(np.argmin(same[::-1]))  # at the end
        kept = min(kept, len(ids) - run + (_REPETITIONS - 1) * period)
    return tokens[:kept]


def _line(conversation: Conversation) -> str:
    return json.dumps(asdict(conversation)) + "\n"


def _conversations(
    engine: VerifierEngine, tokenizer: Any, config: TextConfig, had: list[Conversation]
) -> Iterator[Conversation]:
    """Conversations without end, as they finish; each goes through an instruction and an answer."""
    before, after = chat_template(tokenizer)
    rng = random.Random(f"{config.seed}/{len(had)}")
    instructions: dict[str, list[int]] = {}
    answers: dict[str, tuple[tuple[int, ...], float, list[int]]] = {}
    seen = {conversation.prompt for conversation in had}
    started = 0
    while True:
        while len(instructions) + len(answers) < engine.config.max_requests:
            opening = rng.choice(OPENINGS) if rng.random() < config.opening_share else ""
            name = f"instruction-{started}"
            prompt = before + tokenizer.encode(opening, add_special_tokens=False)
            instructions[name] = tokenizer.encode(opening, add_special_tokens=False)
            engine.add(_request(name, prompt, 1.0, config.max_instruction, rng))
            started += 1
        for result in engine.step():
            name = result.request_id
            if name in instructions:
                instructions[name] += result.token_ids
                if result.finish_reason is None:
                    continue
                turn = instructions.pop(name)
                ended = result.finish_reason is FinishReason.STOP
                body = tuple(turn[:-1]) if ended else ()
                full = (*before, *body, *after)
                if len(body) < MIN_INSTRUCTION_TOKENS or full in seen:
                    continue  # ran on without an end, or was asked before
                seen.add(full)
                temperature = rng.choice(config.temperatures)
                reply = f"answer-{name}"
                answers[reply] = (full, temperature, [])
                engine.add(_request(reply, full, temperature, config.max_answer, rng))
            elif name in answers:
                answers[name][2].extend(result.token_ids)
                if result.finish_reason is None:
                    continue
                prompt_ids, temperature, tokens = answers.pop(name)
                tokens = until_it_repeats(tokens)
                if len(tokens) >= MIN_ANSWER_TOKENS:
                    yield Conversation(prompt_ids, tuple(tokens), temperature)


def _request(
    name: str,
    prompt: list[int] | tuple[int, ...],
    temperature: float,
    limit: int,
    rng: random.Random,
) -> Request:
    sampling = SamplingParams(temperature=temperature, max_tokens=limit, seed=rng.getrandbits(62))
    return Request(name, tuple(prompt), sampling)


def chat_template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before and after the user's text, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SLOT}], add_generation_prompt=True, tokenize=False
    )
    before, slot, after = text.partition(_SLOT)
    if not slot:
        raise ConfigError("the target's chat template does not render the user's text")
    return (
        tokenizer.encode(before, add_special_tokens=False),
        tokenizer.encode(after, add_special_tokens=False),
    )
