"""Incremental text equals the decode of all tokens, whatever they are and however they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers.tokenizer import EOS, byte_level, sentencepiece_like
from hypothesis import given
from hypothesis import strategies as st

from dspark.services.gateway.detokenize import decoder_factory
from dspark.services.gateway.text_stream import Piece, StopFilter, TextSpan, TextStream
from dspark.types import FinishReason, VerificationResult

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "sentencepiece-like": sentencepiece_like,
}
either = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
# Ids beyond the vocabulary occur: models pad their embeddings. Low ids are control and bytes.
token_lists = st.lists(st.one_of(st.integers(0, 440), st.integers(0, 300)), max_size=40)


def stepped(
    tokens: Sequence[int], cuts: st.DataObject, finish: FinishReason = FinishReason.LENGTH
) -> list[VerificationResult]:
    """The tokens as verification steps of random lengths."""
    steps, at = [], 0
    while at < len(tokens):
        size = cuts.draw(st.integers(1, min(8, len(tokens) - at)))
        accepted = cuts.draw(st.integers(0, size))
        at += size
        reason = finish if at == len(tokens) else None
        step = tuple(tokens[at - size : at])
        steps.append(VerificationResult("r", step, accepted, accepted, accepted, reason))
    return steps


def run(
    tokenizer: Any, steps: Sequence[VerificationResult], stop: tuple[str, ...] = ()
) -> list[Piece]:
    stream = TextStream(decoder_factory(tokenizer)(), stop)
    pieces = []
    for step in steps:
        pieces.append(stream.push(step))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(span.text for piece in pieces for span in piece.spans)


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    known = [t for t in tokens if t < len(tokenizer)]
    text: str = tokenizer.decode(known, skip_special_tokens=True)
    return text


@either
@given(tokens=token_lists, cuts=st.data())
def test_deltas_join_to_the_decode(make: Any, tokens: list[int], cuts: st.DataObject) -> None:
    pieces = run(make(), stepped(tokens, cuts))
    assert text_of(pieces) == decoded(make(), tokens)


@either
@given(text=st.text(max_size=30), cuts=st.data())
def test_real_text_comes_back_without_half_characters(
    make: Any, text: str, cuts: st.DataObject
) -> None:
    tokens = make()(text, add_special_tokens=False)["input_ids"]
    pieces = run(make(), stepped(tokens, cuts))
    assert text_of(pieces) == decoded(make(), tokens)
    if "\ufffd" not in decoded(make(), tokens):
        assert all("\ufffd" not in span.text for piece in pieces for span in piece.spans)


@either
@given(tokens=token_lists, cuts=st.data(), stops=st.data())
def test_stop_strings_cut_the_decode_wherever_the_steps_end(
    make: Any, tokens: list[int], cuts: st.DataObject, stops: st.DataObject
) -> None:
    whole = decoded(make(), tokens)
    spot = st.integers(0, max(0, len(whole) - 1))
    found = [whole[a : a + n] for a, n in stops.draw(st.lists(st.tuples(spot, st.integers(1, 6))))]
    stop = (*(s for s in found[:3] if s), "never there \x00")
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    want = whole[: min(ends)[1]] if ends else whole
    pieces = run(make(), stepped(tokens, cuts), stop)
    assert text_of(pieces) == want
    if tokens:
        last = pieces[-1].finish_reason
        assert last is (FinishReason.STOP if ends else FinishReason.LENGTH)


@given(cuts=st.data())
def test_the_same_text_is_marked_alike_however_it_is_cut(cuts: st.DataObject) -> None:
    tokenizer = byte_level()
    tokens = tokenizer("the quick 🎉 fox stops")["input_ids"]
    spans = [span for piece in run(tokenizer, stepped(tokens, cuts)) for span in piece.spans]
    assert "".join(span.text for span in spans) == "the quick 🎉 fox stops"
    assert all(span.text for span in spans)


def test_drafted_text_is_told_from_the_targets() -> None:
    tokenizer = byte_level()
    drafted, written = (tokenizer(text)["input_ids"] for text in ("hello answer", " the dog"))
    step = VerificationResult(
        "r", (*drafted, *written), len(drafted), len(drafted), len(drafted), FinishReason.LENGTH
    )
    (piece,) = run(tokenizer, [step])
    assert piece.spans == (TextSpan("hello answer", True), TextSpan(" the dog", False))


def test_a_character_of_two_sides_belongs_to_who_completes_it() -> None:
    tokenizer = byte_level()
    tokens = tuple(tokenizer.convert_tokens_to_ids(["Ã", "©"]))  # é in two byte tokens
    (piece,) = run(tokenizer, [VerificationResult("r", tokens, 1, 1, 1, FinishReason.LENGTH)])
    assert piece.spans == (TextSpan("é", False),)


def test_text_that_could_become_a_stop_string_waits() -> None:
    tokenizer = byte_level()
    stream = TextStream(decoder_factory(tokenizer)(), ("STOP",))

    def push(text: str, finish: FinishReason | None = None) -> Piece:
        tokens = tuple(tokenizer(text)["input_ids"])
        return stream.push(VerificationResult("r", tokens, 0, 0, 0, finish))

    assert [s.text for s in push("a ST").spans] == ["a "]
    assert [s.text for s in push("A S").spans] == ["STA "]
    assert [s.text for s in push("TO").spans] == []
    assert [s.text for s in push("", None).spans] == []
    end = push("P after it", FinishReason.LENGTH)
    assert end.spans == ()
    assert end.finish_reason is FinishReason.STOP
    assert end.token_ids == tuple(tokenizer("P after it")["input_ids"])[: len(end.token_ids)]
    assert len(end.token_ids) < len(tokenizer("P after it")["input_ids"])


def test_held_text_comes_out_when_nothing_follows() -> None:
    tokenizer = byte_level()
    tokens = tuple(tokenizer("a STO")["input_ids"])
    pieces = run(
        tokenizer, [VerificationResult("r", tokens, 0, 0, 0, FinishReason.LENGTH)], ("STOP",)
    )
    assert text_of(pieces) == "a STO"
    assert pieces[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("size", [1, 2, 5])
def test_of_overlapping_stop_strings_the_first_complete_one_ends(size: int) -> None:
    held = StopFilter(("abcd", "bc"))
    out: list[TextSpan] = []
    for i in range(0, 5, size):
        if not held.hit:
            out += held.push(TextSpan("xabcd"[i : i + size], True))
    assert "".join(span.text for span in out) == "xa"
    assert held.hit


def test_control_tokens_and_the_stop_token_give_no_text() -> None:
    tokenizer = byte_level()
    hello = tokenizer("hello")["input_ids"]
    end = tokenizer.convert_tokens_to_ids(EOS)
    plain = tokenizer(" dog")["input_ids"][0]  # a stop token that the tokenizer takes for text
    for last in (end, plain):
        steps = [VerificationResult("r", (*hello, end, last), 0, 0, 0, FinishReason.STOP)]
        assert text_of(run(tokenizer, steps)) == "hello"


def test_a_long_run_of_invalid_bytes_is_linear_work() -> None:
    tokenizer = sentencepiece_like()
    byte = tokenizer.convert_tokens_to_ids("<0xE4>")
    steps = [VerificationResult("r", (byte,) * 20_000, 0, 0, 0, FinishReason.LENGTH)]
    assert text_of(run(tokenizer, steps)) == "\ufffd" * 20_000
