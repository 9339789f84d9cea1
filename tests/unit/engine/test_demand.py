"""Whether a verifier wants drafts, told with a drafter and without; and how long requests wait."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tables import flat_table
from helpers.tiny import (
    ScriptedLink,
    Tally,
    autoregressive_link,
    tiny_causal_drafter,
    tiny_engine,
    tiny_target,
)

from dspark.engine import roster
from dspark.engine.verifier import VerifierEngine
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import Request, SamplingParams, StepPlan, VerificationPolicy

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5)
# Rows cost nothing, or as much as steps of their own.
FREE = flat_table((1, 8), (1, 5), ((1e3, 1e3), (1e3, 1e3)))
DEAR = flat_table((1, 8), (1, 5), ((1e3, 1e6), (1e3, 1e6)))


def request(name: str = "a", *, speculate: bool = True, max_tokens: int = 200) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, speculate=speculate)
    return Request(name, PROMPT, sampling)


def steps(engine: VerifierEngine, count: int) -> float:
    """The share of them in which drafts were wanted."""
    before = engine.draft_counts
    for _ in range(count):
        engine.step()
    after = engine.draft_counts
    assert after.rounds - before.rounds == count
    return (after.wanting - before.wanting) / count


def test_fixed_blocks_are_wanted_with_a_drafter_and_without() -> None:
    link = ScriptedLink({"a": [0] * 300}, TARGET.vocab_size)
    engine = tiny_engine(TARGET, link=link)
    engine.add(request())
    assert steps(engine, 10) == 1.0
    link.available = False
    assert steps(engine, 10) == 1.0


def test_nobody_wants_drafts_who_would_not_use_them() -> None:
    link = ScriptedLink({"a": [0] * 300}, TARGET.vocab_size)
    engine = tiny_engine(TARGET, link=link)
    engine.add(request(speculate=False))
    assert steps(engine, 10) == 0.0
    engine = tiny_engine(TARGET, link=link)
    engine.set_plan(StepPlan(policy=VerificationPolicy.OFF))
    engine.add(request())
    assert steps(engine, 10) == 0.0
    without = tiny_engine(TARGET)
    without.add(request())
    assert steps(without, 10) == 0.0


@pytest.mark.parametrize(("table", "wrong", "pays"), [(FREE, 0.0, True), (DEAR, 0.9, False)])
def test_what_was_learnt_with_a_drafter_is_known_without(
    table: StepTimeTable, wrong: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = RoundTimes.record

    def as_the_table_has_it(times: RoundTimes, *, requests: int, tokens: int, **of: Any) -> None:
        """This machine's own times, of rows that cost nothing, would be believed after a while."""
        step_ms = table.ms(requests, tokens, 0)
        told = {**of, "step_ms": step_ms, "round_ms": step_ms + 1.0, "waited_ms": 0.0}
        measured(times, requests=requests, tokens=tokens, **told)

    monkeypatch.setattr(RoundTimes, "record", as_the_table_has_it)
    plain = tiny_engine(TARGET)
    plain.add(request(max_tokens=400))
    tally = Tally()
    while plain.has_work:
        tally.add(plain.step())
    link = ScriptedLink({"a": [*PROMPT, *tally.tokens["a"]]}, TARGET.vocab_size, wrong)
    engine = tiny_engine(TARGET, link=link, policy="adaptive")
    engine.table = table
    engine.add(request(max_tokens=400))
    link.available = False
    assert steps(engine, 5) == 1.0, "of what is not known, one has to learn"
    link.available = True
    steps(engine, 40)
    assert (steps(engine, 20) > 0.9) is pays
    link.available = False
    assert steps(engine, 20) == float(pays)


def test_blocks_asked_for_are_counted() -> None:
    engine = tiny_engine(TARGET, link=autoregressive_link(tiny_causal_drafter()))
    engine.add(request(max_tokens=20))
    while engine.has_work:
        engine.step()
    counts = engine.draft_counts
    assert 0 < counts.blocks <= counts.rounds
    assert counts.missed == 0


def test_the_oldest_of_those_who_wait_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(roster.time, "monotonic", lambda: now)
    engine = tiny_engine(TARGET, max_requests=1)
    assert engine.queue_age_s == 0.0
    engine.add(request("a"))
    now = 101.0
    engine.add(request("b"))
    now = 103.0
    assert engine.queue_age_s == 3.0
    engine.step()
    assert engine.queue_age_s == 2.0
    engine.roster.preempt(engine.roster.running["a"])  # it has waited for no time yet
    now = 104.0
    assert engine.queue_age_s == 3.0
    engine.abort("b")
    assert engine.queue_age_s == 1.0
    engine.abort("a")
    assert engine.queue_age_s == 0.0
