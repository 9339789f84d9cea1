"""What a verifier tells of its last steps: who decided, what was promised, what came of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.tables import flat_table
from helpers.tiny import FREE_ROWS, ScriptedLink, Tally, run, tiny_drafter, tiny_engine, tiny_target

from dspark.engine.draft_link import DraftReplies
from dspark.engine.lookup import PromptLookup
from dspark.engine.verifier import VerifierEngine
from dspark.scheduling.explanation import KEPT_STEPS, Basis, StepExplanation
from dspark.scheduling.survival import survival
from dspark.types import DraftWork, Request, SamplingParams, StepPlan, VerificationPolicy

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5)
DEAR = flat_table((1, 8), (1, 5), ((1e3, 1e6), (1e3, 1e6)))


def request(name: str = "a", max_tokens: int = 40, **sampling: Any) -> Request:
    values = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return Request(name, PROMPT, SamplingParams(**values))


def scripted(*requests: Request, wrong: float = 0.2) -> ScriptedLink:
    tokens = run(tiny_engine(TARGET), requests).tokens
    whole = {one.id: [*one.prompt_token_ids, *tokens[one.id]] for one in requests}
    return ScriptedLink(whole, TARGET.vocab_size, wrong)


def stepped(engine: VerifierEngine, steps: int, *requests: Request) -> list[StepExplanation]:
    """What is told of these steps."""
    for one in requests:
        engine.add(one)
    for _ in range(steps):
        engine.step()
    return engine.explain(steps)


class Silent(ScriptedLink):
    """A drafter whose blocks never come."""

    def collect(self, wait_s: float) -> DraftReplies:
        return DraftReplies([])

    def missed(self) -> None:
        pass


def test_nothing_is_told_before_the_first_step() -> None:
    assert tiny_engine(TARGET).explain(KEPT_STEPS) == []


def test_the_last_steps_are_told_in_order_and_no_more_are_kept() -> None:
    engine = tiny_engine(TARGET)
    told = stepped(engine, KEPT_STEPS + 9, request(max_tokens=200))
    assert [step.step for step in told] == list(range(10, KEPT_STEPS + 10))
    assert [step.step for step in engine.explain(2)] == [KEPT_STEPS + 8, KEPT_STEPS + 9]


def test_a_step_tells_of_each_request_what_its_results_say() -> None:
    requests = [request("a"), request("b", 25)]
    engine = tiny_engine(TARGET, link=scripted(*requests), policy="adaptive")
    engine.table = FREE_ROWS
    for one in requests:
        engine.add(one)
    accepted = 0
    while engine.has_work:
        results = {result.request_id: result for result in engine.step()}
        (told,) = engine.explain(1)
        assert engine.last_report is not None
        assert told.step == engine.last_report.step
        assert told.decoding == len(told.requests)
        for one in told.requests:
            result = results[one.request_id]
            assert (one.verified, one.accepted) == (result.verified, result.accepted)
            assert one.committed == len(result.token_ids)
            assert len(one.survivals) == result.drafted
            accepted += one.accepted
        assert told.committed == sum(one.committed for one in told.requests)
        assert told.measured_per_s == (told.round_ms and 1e3 * told.committed / told.round_ms)
        if told.predicted_tokens is not None:
            admitted = sum(sum(one.survivals[: one.verified]) for one in told.requests)
            assert told.predicted_tokens == pytest.approx(told.decoding + admitted)
            assert engine.last_report.predicted_tokens == told.predicted_tokens
            assert engine.last_report.predicted_ms == told.predicted_ms
    assert accepted, "INCONCLUSIVE: nothing was accepted"


def test_nobody_waits_for_those_who_ask() -> None:
    """Another thread asks a thousand times a second while steps go on."""
    requests = [request("a", 200), request("b", 150)]
    engine = tiny_engine(TARGET, tiny_drafter(TARGET))
    over = threading.Event()
    told: list[StepExplanation] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not over.wait(1e-3):
                told[:] = engine.explain(KEPT_STEPS)
                steps = [step.step for step in told]
                assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
        except BaseException as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        tally = run(engine, requests)
    finally:
        over.set()
        asking.join()
    assert not failures
    assert tally.tokens == run(tiny_engine(TARGET), requests).tokens


def test_whole_blocks_are_told_with_their_survivals() -> None:
    """Where nothing is searched for, nothing is predicted; survivals are told all the same."""
    for policy in ("fixed", "adaptive"):  # the latter has no step times
        engine = tiny_engine(TARGET, link=scripted(request()), policy=policy)
        told = stepped(engine, 2, request())[-1]
        assert told.basis is Basis.WHOLE
        assert told.policy == policy
        (one,) = told.requests
        assert one.survivals == pytest.approx(survival([0.8] * 4).tolist())
        assert one.verified == 4
        assert told.predicted_tokens is told.predicted_ms is told.predicted_per_s is None


@pytest.mark.parametrize(("temperature", "basis"), [(0.0, Basis.GLOBAL), (1.0, Basis.CAUSAL)])
def test_the_search_is_told(temperature: float, basis: Basis) -> None:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), policy="adaptive")
    engine.table = FREE_ROWS
    engine.set_plan(StepPlan(epoch=7, max_draft_tokens=3))
    told = stepped(engine, 2, request(temperature=temperature))[-1]
    assert (told.basis, told.plan_epoch, told.ceiling) == (basis, 7, 3)
    assert told.requests[0].verified == 3
    assert told.predicted_per_s is not None


def refusals() -> Sequence[tuple[Basis, VerifierEngine, Request]]:
    off = tiny_engine(TARGET, link=scripted(request()))
    off.set_plan(StepPlan(policy=VerificationPolicy.OFF))
    away = scripted(request())
    away.available = False
    return (
        (Basis.OFF, off, request()),
        (Basis.NO_DRAFTER, tiny_engine(TARGET), request()),
        (Basis.NO_DRAFTER, tiny_engine(TARGET, link=away), request()),
        (Basis.UNWANTED, tiny_engine(TARGET, link=scripted(request())), request(speculate=False)),
        (Basis.NO_BLOCKS, tiny_engine(TARGET, link=Silent({"a": [0] * 99}, 32)), request()),
    )


def test_why_nothing_was_verified_is_told() -> None:
    for basis, engine, one in refusals():
        told = stepped(engine, 2, one)[-1]
        assert told.basis is basis
        assert [r.survivals for r in told.requests] == [()]
        assert told.committed == told.requests[0].committed == 1
        assert told.predicted_per_s is None


def test_a_gate_that_asks_for_nothing_is_told() -> None:
    engine = tiny_engine(TARGET, link=scripted(request(max_tokens=300)), policy="adaptive")
    engine.table = DEAR
    engine.add(request(max_tokens=300))
    seen = set()
    while engine.has_work and Basis.NOT_ASKED not in seen:
        engine.step()
        seen.add(engine.explain(1)[0].basis)
    assert Basis.NOT_ASKED in seen


def test_prompts_are_told_apart_from_those_who_decode() -> None:
    engine = tiny_engine(TARGET, prefill_chunk_tokens=3)
    first, second = stepped(engine, 2, request())
    assert (first.basis, first.decoding, first.prompt_tokens) == (Basis.PROMPTS, 0, 3)
    assert second.basis is Basis.PROMPTS  # its last chunk commits a token, and nobody decoded
    assert (second.decoding, second.committed) == (0, 0)
    assert engine.last_report is not None
    assert engine.last_report.committed == 1
    assert first.round_ms is first.measured_per_s is None


def test_looked_up_blocks_are_told_as_such() -> None:
    engine = tiny_engine(TARGET, lookup=PromptLookup())
    one = Request("a", (1, 2, 3, 4) * 5, SamplingParams(temperature=0.0, max_tokens=100))
    engine.add(one)
    tally, looked_up = Tally(), False
    while engine.has_work:
        results = engine.step()
        tally.add(results)
        looked_up |= engine.explain(1)[0].looked_up
        assert engine.explain(1)[0].looked_up == (results[0].drafted > 0)
    assert looked_up, "INCONCLUSIVE: nothing was looked up"


def test_records_hold_no_tokens() -> None:
    work = DraftWork.__name__  # what goes to drafters may hold them; what is kept for people not
    engine = tiny_engine(TARGET, link=scripted(request()))
    stepped(engine, 5, request())
    text = repr(engine._accounts._records._ring)
    assert "token_ids" not in text
    assert work not in text
