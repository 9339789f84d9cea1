"""Prompt lookup: what is found, what is believed of it, and that output stays the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers.tables import flat_table
from helpers.tiny import (
    FREE_ROWS,
    RecordingLink,
    Tally,
    run,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)
from hypothesis import given
from hypothesis import strategies as st

from dspark.engine import sequence as engine_sequence
from dspark.engine.lookup import PromptLookup
from dspark.engine.text_index import TextIndex
from dspark.scheduling.round_times import RoundTimes
from dspark.types import BlockProposal, Request, SamplingParams, VerifyMode

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
GREEDY = SamplingParams(temperature=0.0, max_tokens=80)
COUPLED = replace(GREEDY, temperature=0.5, mode=VerifyMode.COUPLED)


def conclusive(tally: Tally) -> Tally:
    assert tally.drafted > 0, "INCONCLUSIVE: nothing was drafted"
    assert tally.verified > 0, "INCONCLUSIVE: nothing was verified"
    assert tally.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    return tally


def sequence(tokens: Sequence[int], sampling: SamplingParams = GREEDY) -> engine_sequence.Sequence:
    return engine_sequence.Sequence(Request("a", tuple(tokens), sampling), frozenset())


def looked_up(tokens: Sequence[int], size: int = 4, **sampling: Any) -> BlockProposal | None:
    one = sequence(tokens, replace(GREEDY, **sampling))
    return PromptLookup().propose(one, size)


def match_by_search(tokens: list[int]) -> tuple[int, int]:
    for length in (4, 3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[len(tokens) - length :]:
                return length, start + length
    return 0, 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_an_index_that_grows_finds_what_a_search_finds(
    tokens: list[int], data: st.DataObject
) -> None:
    index = TextIndex()
    for end in sorted(data.draw(st.sets(st.integers(1, len(tokens))))):
        assert index.find(tokens[:end]) == match_by_search(tokens[:end])
    assert len(index.after) <= 3 * len(tokens)


def test_the_longest_match_counts_and_then_the_latest() -> None:
    def ids(*tokens: int) -> list[int]:
        block = looked_up(tokens)
        return [] if block is None else block.token_ids.tolist()

    assert ids(1, 2, 3, 4, 5, 6) == []
    assert ids(1, 2, 7, 7, 8, 9, 1, 2) == [7, 7, 8, 9]
    assert ids(1, 2, 7, 0, 1, 2, 8, 0, 1, 2) == [8, 0, 1, 2]
    assert ids(5, 1, 2, 7, 0, 1, 2, 8, 0, 5, 1, 2) == [7, 0, 1, 2]
    assert ids(9, 1, 2, 1, 2) == [1, 2, 1, 2]  # goes round where the text ends


def test_the_law_is_a_point_and_is_there_only_where_it_is_needed() -> None:
    text = (1, 2, 7, 8, 9, 1, 2)
    block = looked_up(text, temperature=1.0)
    assert block is not None
    assert block.candidate_ids is not None
    assert block.candidate_probs is not None
    assert block.candidate_ids.tolist() == [[7], [8], [9], [1]]
    assert block.candidate_probs.tolist() == [[1.0]] * 4
    for free in ({}, {"temperature": 1.0, "mode": VerifyMode.COUPLED}):
        block = looked_up(text, **free)
        assert block is not None
        assert block.candidate_ids is None


def test_confidences_follow_what_came_true() -> None:
    """A text whose pairs go on alike half of the time, and beyond never: both are learnt."""
    lookup = PromptLookup()
    one = sequence([1, 2])
    block = None
    for i in range(400):
        block = lookup.propose(one, 2)
        one.tokens += [3 if i % 2 else 4, 10 + i, 1, 2]  # what follows 1 2 alternates
    assert block is not None
    assert block.confidences[0] < 0.1
    for _ in range(400):
        block = lookup.propose(one, 2)
        one.tokens += [5, 6, 1, 2]
    assert block is not None
    assert block.token_ids.tolist() == [5, 6]
    assert block.confidences.tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("budget_seed", [None, 5])
def test_output_is_that_of_plain_decoding(
    sampling: SamplingParams, budget_seed: int | None
) -> None:
    requests = [Request(str(n), PROMPT[:n] * 2, replace(sampling, seed=n)) for n in (1, 3, 8)]
    plain = run(tiny_engine(TARGET), requests)
    assert plain.drafted == 0
    engine = tiny_engine(TARGET, lookup=PromptLookup(), check_pages=True)
    tally = conclusive(run(engine, requests, budget_seed=budget_seed))
    assert tally.tokens == plain.tokens


def test_little_room_and_shared_prompts_change_nothing() -> None:
    requests = [Request(str(i), (*PROMPT * 3, i), GREEDY) for i in range(5)]
    plain = run(tiny_engine(TARGET), requests)
    engine = tiny_engine(TARGET, lookup=PromptLookup(), cache_tokens=192, check_pages=True)
    tally = conclusive(run(engine, requests))
    assert engine.roster.preemptions > 0
    assert tally.tokens == plain.tokens


def test_nothing_is_looked_up_for_those_who_do_not_want_it() -> None:
    one = Request("a", PROMPT * 2, replace(GREEDY, speculate=False))
    assert run(tiny_engine(TARGET, lookup=PromptLookup()), [one]).drafted == 0


class Leaving(RecordingLink):
    """A drafter that is away when it is told to be."""

    away = False

    @property
    def available(self) -> bool:
        return not self.away


@pytest.mark.parametrize("policy", ["fixed", "adaptive"])
def test_blocks_are_the_drafters_while_it_is_there(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)  # this machine's own times
    drafter = tiny_drafter(TARGET)
    link = Leaving(drafter)
    engine = tiny_engine(TARGET, drafter, link=link, lookup=PromptLookup(), policy=policy)
    if policy == "adaptive":
        engine.table = FREE_ROWS
    one = Request("a", PROMPT, replace(GREEDY, max_tokens=300))
    engine.add(one)
    tally = Tally()
    drafted_by: list[tuple[bool, int, int]] = []  # whether the drafter was away, and did the work
    for step in range(80):
        link.away = 20 <= step < 60
        blocks, before = len(link.blocks), tally.drafted
        tally.add(engine.step())
        drafted_by.append((link.away, len(link.blocks) - blocks, tally.drafted - before))
    gone = drafted_by[22:60]
    assert sum(own for _, own, _ in gone) == 0
    assert sum(drafted for *_, drafted in gone) > 0, "INCONCLUSIVE: nothing was looked up"
    assert sum(own for _, own, _ in drafted_by[62:]) > 0, "INCONCLUSIVE: it did not come back"
    while engine.has_work:
        tally.add(engine.step())
    assert tally.tokens == run(tiny_engine(TARGET), [one]).tokens


def test_where_rows_are_dear_nothing_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks are verified where that is free, and not where it is not."""
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)  # this machine's own times
    dear = flat_table((1, 8), (1, 5), ((1e3, 1e6), (1e3, 1e6)))
    free = flat_table((1, 8), (1, 5), ((1e3, 1e3), (1e3, 1e3)))
    one = Request("a", PROMPT * 2, GREEDY)
    for table, pays in ((dear, False), (free, True)):
        engine = tiny_engine(TARGET, lookup=PromptLookup(), policy="adaptive")
        engine.table = table
        tally = run(engine, [one])
        assert tally.drafted > 0, "INCONCLUSIVE: nothing was drafted"
        assert (tally.verified > 0) is pays
