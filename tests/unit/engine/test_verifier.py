"""The step loop: ends, aborts, refusals, and drafts that come late, wrong or not at all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.tables import flat_table
from helpers.tiny import (
    FREE_ROWS,
    RecordingLink,
    ScriptedLink,
    Tally,
    random_plan,
    run,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark.engine import plan_in_force, verifier
from dspark.engine.draft_link import DraftReplies, LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.errors import InvalidRequestError, OverloadedError
from dspark.kernels.attention_plan import PAGE_SIZE
from dspark.models.capture import Capture
from dspark.models.target import TargetOutput
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import (
    DraftWork,
    Fence,
    FinishReason,
    Request,
    SamplingParams,
    StepPlan,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
TARGET = tiny_target()


def request(name: str = "a", max_tokens: int = 60, **sampling: object) -> Request:
    values = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return Request(name, PROMPT, SamplingParams(**values))  # type: ignore[arg-type]


def plain(one: Request) -> list[int]:
    return run(tiny_engine(TARGET), [one]).tokens[one.id]


def scripted(one: Request, wrong: float = 0.0) -> ScriptedLink:
    return ScriptedLink({one.id: [*one.prompt_token_ids, *plain(one)]}, TARGET.vocab_size, wrong)


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
    # What became of the tokens past the stop is not told, and nor is what was promised of them.
    last = tally.results[-1]
    assert last.verified > last.accepted == len(last.confidences)


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

    def collect(self, wait_s: float) -> DraftReplies:
        self.available = True
        now = super().collect(wait_s).proposals
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
        def collect(self, wait_s: float) -> DraftReplies:
            wild = [
                replace(p, token_ids=p.token_ids + 1000) for p in super().collect(wait_s).proposals
            ]
            return DraftReplies(wild)

    one = request()
    tally = with_link(Wild({one.id: [*PROMPT, *plain(one)]}, TARGET.vocab_size, 0.0))
    assert tally.drafted == 0
    assert tally.tokens["a"] == plain(one)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda fence: replace(fence, session="b"), id="session"),
        pytest.param(lambda fence: replace(fence, epoch=fence.epoch + 1), id="epoch"),
        pytest.param(lambda fence: replace(fence, round=fence.round - 1), id="round"),
        pytest.param(lambda fence: replace(fence, committed_len=fence.committed_len - 1), id="len"),
    ],
)
def test_a_proposal_for_another_state_is_dropped(other: Callable[[Fence], Fence]) -> None:
    class Stale(ScriptedLink):
        def collect(self, wait_s: float) -> DraftReplies:
            proposals = super().collect(wait_s).proposals
            return DraftReplies([replace(p, fence=other(p.fence)) for p in proposals])

    one = request()
    tally = with_link(Stale({one.id: [*PROMPT, *plain(one)]}, TARGET.vocab_size, 0.0))
    assert tally.drafted == 0
    assert tally.tokens["a"] == plain(one)


def test_a_draft_without_its_law_is_not_used_where_one_is_needed() -> None:
    one = request(temperature=1.0)
    link = ScriptedLink({one.id: [0] * 100}, TARGET.vocab_size, 0.0)
    tally = run(tiny_engine(TARGET, tiny_drafter(TARGET), link=link), [one])
    assert tally.drafted == 0
    assert len(tally.tokens["a"]) == 60


def test_nothing_is_drafted_for_those_who_do_not_want_it() -> None:
    tally = run(
        tiny_engine(TARGET, tiny_drafter(TARGET)), [request("a", speculate=False), request("b")]
    )
    drafted = {name: sum(r.drafted for r in tally.results if r.request_id == name) for name in "ab"}
    assert drafted["a"] == 0
    assert drafted["b"] > 0


def blocks_of(link: RecordingLink, **config: object) -> dict[tuple[str, int], list[int]]:
    tally = with_link(link, **config)
    assert tally.tokens["a"] == plain(request())
    return link.blocks


class Away(RecordingLink):
    """Cannot be reached from the tenth round to the twentieth."""

    asked = 0

    @property
    def available(self) -> bool:
        self.asked += 1
        return not 10 <= self.asked < 20


class Forgetting(RecordingLink):
    """Loses its sessions at every tenth round."""

    rounds = 0

    def submit(self, works: Sequence[DraftWork]) -> None:
        self.rounds += 1
        if self.rounds % 10 == 0:
            self.engine.free("a")
        super().submit(works)


@pytest.mark.parametrize("disturbed", [Away, Forgetting, "small pieces", "small chunks"])
def test_blocks_depend_on_committed_text_alone(disturbed: type[RecordingLink] | str) -> None:
    """Features lost, resent or cut up: afterwards the very same blocks are drafted."""
    drafter = tiny_drafter(TARGET)
    undisturbed = blocks_of(RecordingLink(drafter))
    link = (disturbed if isinstance(disturbed, type) else RecordingLink)(drafter)
    if disturbed == "small pieces":
        link.catch_up_rows = 3
    got = blocks_of(link, prefill_chunk_tokens=3 if disturbed == "small chunks" else 256)
    common = undisturbed.keys() & got.keys()
    assert len(common) > 25
    assert max(common)[1] > 60  # to the end, not only until the disturbance
    assert {key: got[key] for key in common} == {key: undisturbed[key] for key in common}


def test_an_abort_gives_everything_back() -> None:
    link = RecordingLink(tiny_drafter(TARGET))
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=link, max_requests=1)
    engine.add(request("running"))
    engine.add(request("waiting"))
    for _ in range(5):
        engine.step()
    assert link.engine.sessions == 1
    for name in ("running", "waiting", "unknown"):
        engine.abort(name)
    running, waiting, free, total = engine.load
    assert (running, waiting, free) == (0, 0, total)
    assert link.engine.sessions == 0
    assert not engine.has_work
    assert engine.step() == []


def test_a_drafter_that_forgot_is_sent_the_features_again() -> None:
    drafter = tiny_drafter(TARGET)
    draft_engine = DraftEngine(DSparkBlocks(drafter), num_pages=64)

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
    link = LocalDraftLink(DraftEngine(DSparkBlocks(drafter), num_pages=8))
    requests = [request(str(i), max_tokens=40) for i in range(6)]
    tally = run(tiny_engine(TARGET, drafter, link=link), requests)
    assert tally.drafted > 0
    assert all(tokens == plain(request(max_tokens=40)) for tokens in tally.tokens.values())


def test_an_adaptive_engine_verifies_nothing_that_does_not_pay() -> None:
    dear = flat_table((1, 8), (1, 5), ((1.0, 500.0), (1.0, 500.0)))
    free = flat_table((1, 8), (1, 5), ((10.0, 10.0), (10.0, 10.0)))
    for table, pays in ((dear, False), (free, True)):
        engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=scripted(request(), 0.3), policy="adaptive"
        )
        engine.table = table
        tally = run(engine, [request()])
        assert tally.tokens["a"] == plain(request())
        assert (tally.verified > 0) is pays


def test_rounds_in_which_something_was_captured_say_nothing_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(RoundTimes, "record", lambda _, **round_of: recorded.append(round_of))
    monkeypatch.setattr(Capture, "made", 0)
    target, steps = tiny_target(), 0
    honest = target.forward

    def forward(*step: Any) -> TargetOutput:
        nonlocal steps
        steps += 1
        Capture.made += steps % 3 == 0
        return honest(*step)

    monkeypatch.setattr(target, "forward", forward)
    engine = tiny_engine(target, tiny_drafter(target), policy="adaptive")
    engine.table = flat_table((1, 8), (1, 5), ((10.0, 10.0), (10.0, 10.0)))
    run(engine, [request()])
    assert steps > 9
    assert len(recorded) == steps - 1 - Capture.made  # the first follows no other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_thinking_beside_steps_changes_no_output_and_misses_no_round(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU: rounds are learnt from, and estimates made, during the next forward."""
    recorded: list[dict[str, Any]] = []
    monkeypatch.setattr(RoundTimes, "record", lambda _, **of: recorded.append(of))
    asked = [request(str(i), temperature=temperature, seed=i) for i in range(3)]
    told: list[list[tuple[int, int, int]]] = []
    said: list[object] = []
    for overlaps in (False, True):
        recorded.clear()
        engine = tiny_engine(TARGET, tiny_drafter(TARGET), policy="adaptive")
        engine.table = flat_table((1, 8), (1, 5), ((10.0, 10.0), (10.0, 10.0)))
        engine._overlaps = overlaps
        tally = run(engine, asked)
        assert tally.verified > 0
        said.append(tally.tokens)
        told.append([(of["requests"], of["tokens"], of["drafted"]) for of in recorded])
    behind, beside = told
    assert said[0] == said[1]
    if not temperature:
        assert said[0] == run(tiny_engine(TARGET), asked).tokens
    assert beside == behind[:-1], "the last is learnt from when another step comes"


def test_what_pays_depends_on_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost nothing at short contexts and a fortune at long ones."""
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)  # this machine's own times
    free, dear = ((1e3, 1e3),) * 2, ((1e3, 1e6),) * 2
    table = StepTimeTable((1, 8), (1, 5), (100, 200), (free, dear))
    for prompt, pays in (((3, 1, 4), True), ((3, 1, 4) * 80, False)):
        asked = Request("a", prompt, request().sampling)
        engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=scripted(asked, 0.3), policy="adaptive"
        )
        engine.table = table
        tally = run(engine, [asked])
        assert tally.drafted > 0
        assert (tally.verified > 0) is pays


def test_a_plan_that_lapsed_leaves_the_verifier_to_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the scheduler is gone: the configured policy, planned here by the same code."""
    now = time.monotonic()
    monkeypatch.setattr(plan_in_force.time, "monotonic", lambda: now)
    one = request()
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=scripted(one), prefix_cache=False)
    engine.set_plan(StepPlan(epoch=1, policy=VerificationPolicy.OFF, valid_for_s=10.0))
    now += 9.9
    planned = run(engine, [one])
    assert planned.drafted == 0
    now += 0.2
    alone = run(engine, [one])
    assert alone.verified > 40
    assert alone.tokens == planned.tokens


def test_blocks_are_cut_to_what_a_text_has_room_for() -> None:
    """They are asked for alike, so that all of a round are one pass of the drafter."""
    one = Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=3))
    tally = run(tiny_engine(TARGET, tiny_drafter(TARGET)), [one])
    assert [result.drafted for result in tally.results][1] == 1  # and one token follows it


def test_drafting_that_loses_ends_although_prompts_keep_coming() -> None:
    """Steps with prompts do not compare; under steady traffic there are hardly any others."""
    short, long = request(), Request("b", tuple(range(1, 31)) * 13, request().sampling)
    engine = tiny_engine(
        TARGET,
        tiny_drafter(TARGET),
        link=scripted(short, 0.99),
        policy="adaptive",
        prefill_chunk_tokens=16,
    )
    engine.table = flat_table((1, 8), (1, 5), ((10.0, 50.0), (10.0, 50.0)))
    tally = Tally()
    engine.add(short)
    engine.add(long)
    for _ in range(20):
        tally.add(engine.step())
        assert engine.last_report is not None
        assert engine.last_report.prefill_tokens > 0
    assert 1 <= sum(result.drafted > 0 for result in tally.results) <= 6
    assert len(tally.results) >= 18


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


LONGEST = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LONGEST)


@cache
def continuation(prompt: tuple[int, ...]) -> list[int]:
    """What the target says greedily, alone, without drafts or a prefix cache."""
    engine = tiny_engine(TARGET, prefix_cache=False)
    return run(engine, [Request("truth", prompt, GREEDY)]).tokens["truth"]


class SteppingClock:
    """Rounds take drawn times: the machine's own would steer what hypothesis wants to repeat."""

    def __init__(self) -> None:
        self._now, self._rng = 0.0, random.Random(0)

    def perf_counter(self) -> float:
        self._now += self._rng.uniform(0.5e-3, 2e-3)
        return self._now


class EngineMachine(RuleBasedStateMachine):
    """Random requests, steps, budgets and aborts on few pages: who is preempted, and who shares a
    prefix, shows in nobody's tokens, and every page has the holders that it should.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = mock.patch.object(verifier, "time", SteppingClock())
        self.clock.start()
        self.link = RecordingLink(tiny_drafter(TARGET), num_pages=12)  # too few: some are evicted
        self.engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=self.link, cache_tokens=112, max_requests=4
        )
        self.engine.table = FREE_ROWS
        self.live: dict[str, Request] = {}
        self.said: dict[str, list[int]] = {}
        self.count = 0

    @rule(
        length=st.integers(1, 60),
        variant=st.integers(0, 2),
        max_tokens=st.integers(1, LONGEST),
        temperature=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def add(self, length: int, variant: int, max_tokens: int, temperature: float) -> None:
        name = str(self.count)
        self.count += 1
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=self.count)
        # Prompts begin alike and part in their third page, or late in their second.
        prompt = [*(i % 31 for i in range(length))]
        prompt[28 + 5 * variant :] = [variant] * len(prompt[28 + 5 * variant :])
        self.live[name] = Request(name, tuple(prompt), sampling)
        self.engine.add(self.live[name])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.abort(name)
        del self.live[name]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.link.engine.free(data.draw(st.sampled_from(sorted(self.live))))

    @precondition(lambda self: self.engine.roster.running)
    @rule()
    def preempt(self) -> None:
        self.engine.roster.preempt(next(reversed(self.engine.roster.running.values())))

    @rule(seed=st.integers(0, 1000), steps=st.integers(1, 4))
    def step(self, seed: int, steps: int) -> None:
        self.engine.set_plan(random_plan(random.Random(seed)))
        for _ in range(steps):
            self.take(self.engine.step())

    def take(self, results: Iterable[VerificationResult]) -> None:
        for result in results:
            assert 0 <= result.accepted <= result.verified <= result.drafted
            said = self.said.setdefault(result.request_id, [])
            said.extend(result.token_ids)
            one = self.live[result.request_id]
            if one.sampling.greedy:
                assert said == continuation(one.prompt_token_ids)[: len(said)]
            if result.finish_reason is not None:
                assert len(said) == one.sampling.max_tokens
                del self.live[result.request_id]

    @invariant()
    def pages_are_held_by_those_who_say_so(self) -> None:
        self.engine.check_pages()
        self.link.engine.check_pages()
        assert all(not sequence.pages.size for sequence in self.engine.roster.waiting)

    @invariant()
    def only_live_requests_are_drafted_for(self) -> None:
        assert self.link.engine.held.names <= self.live.keys()

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.clock.stop()

    def end(self) -> None:
        while self.engine.has_work:
            self.take(self.engine.step())
        assert not self.live
        _, _, free, total = self.engine.load
        assert free == total == 112 // PAGE_SIZE
        assert self.link.engine.sessions == 0


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=200,  # of fifty operations: ten thousand
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def prefix_requests(count: int) -> list[Request]:
    """Different questions after the same long text."""
    shared = tuple((7 * i) % 31 for i in range(100))
    return [Request(str(i), (*shared, i, 2 * i, 3), GREEDY) for i in range(count)]


def test_a_shared_prefix_is_computed_once_and_drafted_from_as_well_as_anew() -> None:
    """Warm requests skip the shared pages, say the same, and get the same blocks as cold ones."""
    blocks, tokens, prefill = [], [], []
    for warm in (False, True):
        link = RecordingLink(tiny_drafter(TARGET))
        engine = tiny_engine(
            TARGET, tiny_drafter(TARGET), link=link, prefix_cache=warm, check_pages=True
        )
        first = run(engine, prefix_requests(1))
        computed = 0
        for one in prefix_requests(6)[1:]:
            engine.add(one)
        tally = Tally()
        while engine.has_work:
            tally.add(engine.step())
            assert engine.last_report is not None
            computed += engine.last_report.prefill_tokens
        blocks.append(link.blocks)
        tokens.append(first.tokens | tally.tokens)
        prefill.append(computed)
        assert tally.accepted > 0
    assert tokens[0] == tokens[1]
    assert blocks[0] == blocks[1]
    assert prefill[1] < 0.2 * prefill[0]


def test_the_request_admitted_last_makes_room_and_goes_on_where_it_was() -> None:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), cache_tokens=160, check_pages=True)
    sampling = {"temperature": 1.0, "mode": VerifyMode.COUPLED}
    requests = [request(str(i), max_tokens=60, seed=i, **sampling) for i in range(4)]
    tally = run(engine, requests)
    assert engine.roster.preemptions > 0
    roomy = run(tiny_engine(TARGET, tiny_drafter(TARGET)), requests)
    assert tally.tokens == roomy.tokens
    assert next(r.request_id for r in tally.results if r.finish_reason) == "0"


def test_prompts_do_not_stall_those_who_decode() -> None:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), prefill_chunk_tokens=256)
    engine.table = flat_table((1, 8), (1, 5), ((10.0, 14.0), (10.0, 14.0)))  # 1 ms a row
    engine.add(request())
    engine.step()
    engine.add(Request("long", (1,) * 200, SamplingParams(max_tokens=1)))
    engine.step()
    assert engine.last_report is not None
    assert PAGE_SIZE <= engine.last_report.prefill_tokens <= 21
