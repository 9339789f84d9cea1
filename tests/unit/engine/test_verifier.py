"""The step loop: ends, aborts, refusals, and drafts that come late, wrong or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import (
    ScriptedLink,
    Tally,
    random_plan,
    run,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark.engine.draft_link import DraftReplies, LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.errors import InvalidRequestError, OverloadedError
from dspark.models.kv_cache import PAGE_SIZE
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import DraftWork, Fence, FinishReason, Request, SamplingParams

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
TARGET = tiny_target()


def request(name: str = "a", max_tokens: int = 60, **sampling: object) -> Request:
    values = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return Request(name, PROMPT, SamplingParams(**values))  # type: ignore[arg-type]


def plain(one: Request) -> list[int]:
    return run(tiny_engine(TARGET), [one]).tokens[one.id]


def scripted(one: Request, wrong: float = 0.0) -> ScriptedLink:
    return ScriptedLink({one.id: [*PROMPT, *plain(one)]}, TARGET.vocab_size, wrong)


def with_link(link: object, **config: object) -> Tally:
    drafter = tiny_drafter(TARGET)
    return run(tiny_engine(TARGET, drafter, link=link, **config), [request()])  # type: ignore[arg-type]


def test_nothing_follows_a_stop_token_inside_a_block() -> None:
    whole = plain(request())
    stop = whole[9]
    one = request(stop_token_ids=(stop,))
    link = ScriptedLink({"a": [*PROMPT, *whole]}, TARGET.vocab_size, wrong=0.0)
    tally = run(tiny_engine(TARGET, tiny_drafter(TARGET), link=link), [one])
    assert tally.tokens["a"] == whole[: whole.index(stop) + 1]
    assert tally.results[-1].finish_reason is FinishReason.STOP
    assert tally.accepted > 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_no_more_than_max_tokens_come(max_tokens: int) -> None:
    one = request(max_tokens=max_tokens)
    tally = run(tiny_engine(TARGET, tiny_drafter(TARGET), link=scripted(one)), [one])
    assert tally.tokens["a"] == plain(request())[:max_tokens]
    assert tally.results[-1].finish_reason is FinishReason.LENGTH


def test_true_drafts_are_all_accepted() -> None:
    tally = with_link(scripted(request()))
    assert tally.accepted == tally.verified == tally.drafted > 40
    assert tally.tokens["a"] == plain(request())


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    one = Request("a", PROMPT * 12, SamplingParams(temperature=0.0, max_tokens=20))
    whole = run(tiny_engine(TARGET), [one]).tokens
    assert (
        run(tiny_engine(TARGET, tiny_drafter(TARGET), prefill_chunk_tokens=7), [one]).tokens
        == whole
    )


class Unreliable(ScriptedLink):
    """Loses, delays and repeats proposals; is away for whole stretches."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._chance = np.random.default_rng(1)
        self._late: list[object] = []

    def submit(self, works: Sequence[DraftWork]) -> None:
        super().submit(works)
        self.available = self._chance.random() < 0.8

    def collect(self, wanted: set[Fence]) -> DraftReplies:
        self.available = True
        now = super().collect(wanted).proposals
        out = [p for p in [*self._late, *now] if self._chance.random() < 0.7]
        self._late = [p for p in now if self._chance.random() < 0.3]
        return DraftReplies(out)  # type: ignore[arg-type]


def test_lost_late_and_repeated_proposals_change_nothing() -> None:
    one = request()
    link = Unreliable({one.id: [*PROMPT, *plain(one)]}, TARGET.vocab_size, 0.2)
    tally = with_link(link)
    assert tally.accepted > 0
    assert tally.tokens["a"] == plain(one)


def test_a_proposal_of_unknown_tokens_is_not_verified() -> None:
    class Wild(ScriptedLink):
        def collect(self, wanted: set[Fence]) -> DraftReplies:
            wild = [
                replace(p, token_ids=p.token_ids + 1000) for p in super().collect(wanted).proposals
            ]
            return DraftReplies(wild)

    one = request()
    tally = with_link(Wild({one.id: [*PROMPT, *plain(one)]}, TARGET.vocab_size, 0.0))
    assert tally.drafted == 0
    assert tally.tokens["a"] == plain(one)


def test_a_drafter_that_forgot_is_sent_the_features_again() -> None:
    drafter = tiny_drafter(TARGET)
    draft_engine = DraftEngine(drafter, num_pages=64)

    class Forgetful(LocalDraftLink):
        rounds = 0

        def submit(self, works: Sequence[DraftWork]) -> None:
            self.rounds += 1
            if self.rounds % 10 == 0:
                draft_engine.free("a")
            super().submit(works)

    whole = run(tiny_engine(TARGET, drafter), [request()])
    again = run(tiny_engine(TARGET, drafter, link=Forgetful(draft_engine)), [request()])
    assert again.tokens == whole.tokens
    assert whole.drafted * 0.7 < again.drafted < whole.drafted  # a round is lost each time


def test_a_full_draft_cache_evicts_idle_sessions_and_goes_on() -> None:
    drafter = tiny_drafter(TARGET)
    link = LocalDraftLink(DraftEngine(drafter, num_pages=8))
    requests = [request(str(i), max_tokens=40) for i in range(6)]
    tally = run(tiny_engine(TARGET, drafter, link=link), requests)
    assert tally.drafted > 0
    assert all(tokens == plain(request(max_tokens=40)) for tokens in tally.tokens.values())


def test_an_adaptive_engine_verifies_nothing_that_does_not_pay() -> None:
    dear = StepTimeTable((1, 8), (1, 5), ((1.0, 500.0), (1.0, 500.0)))
    free = StepTimeTable((1, 8), (1, 5), ((10.0, 10.0), (10.0, 10.0)))
    for table, pays in ((dear, False), (free, True)):
        engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=scripted(request(), 0.3), policy="adaptive"
        )
        engine.table = table
        tally = run(engine, [request()])
        assert tally.tokens["a"] == plain(request())
        assert (tally.verified > 0) is pays


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (Request("a", ()), InvalidRequestError, "empty"),
        (Request("a", (32,)), InvalidRequestError, "token ids"),
        (Request("a", (-1,)), InvalidRequestError, "token ids"),
        (Request("a", (1,) * 500), InvalidRequestError, "context of 512"),
    ],
)
def test_what_can_never_run_is_refused(bad: Request, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        tiny_engine(TARGET).add(bad)


def test_a_full_queue_and_a_used_id_are_refused() -> None:
    engine = tiny_engine(TARGET, max_waiting=2, max_requests=1)
    engine.add(request("a"))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(request("a"))
    engine.add(request("b"))
    with pytest.raises(OverloadedError, match="wait already"):
        engine.add(request("c"))


class EngineMachine(RuleBasedStateMachine):
    """Random requests, steps, budgets and aborts: pages are owned once, and all come back."""

    def __init__(self) -> None:
        super().__init__()
        self.link = LocalDraftLink(DraftEngine(tiny_drafter(TARGET), num_pages=24))
        self.engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=self.link, cache_tokens=256, max_requests=4
        )
        self.live: set[str] = set()
        self.count = 0

    @rule(
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def add(self, length: int, max_tokens: int, temperature: float) -> None:
        name = str(self.count)
        self.count += 1
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=self.count)
        self.engine.add(Request(name, tuple(i % 32 for i in range(length)), sampling))
        self.live.add(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.abort(name)
        self.live.discard(name)

    @rule(seed=st.integers(0, 1000), steps=st.integers(1, 6))
    def step(self, seed: int, steps: int) -> None:
        import random

        self.engine.set_plan(random_plan(random.Random(seed)))
        for _ in range(steps):
            self.take(self.engine.step())

    def take(self, results: Iterable[object]) -> None:
        for result in results:
            assert result.request_id in self.live  # type: ignore[attr-defined]
            if result.finish_reason is not None:  # type: ignore[attr-defined]
                self.live.discard(result.request_id)  # type: ignore[attr-defined]

    @invariant()
    def pages_are_owned_once(self) -> None:
        owned = [page for s in self.engine._running.values() for page in s.pages]
        assert len(owned) == len(set(owned))
        assert 0 not in owned
        assert len(owned) + self.engine._pages.free == self.engine._pages.total

    def teardown(self) -> None:
        while self.engine.has_work:
            self.take(self.engine.step())
        assert not self.live
        _, _, free, total = self.engine.load
        assert free == total == 256 // PAGE_SIZE
        assert self.link._engine.sessions == 0


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
