"""A verifier with several draft replicas: all are used, and losing some costs blocks alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from helpers.draft_services import TARGET, WEIGHTS, Silent, serving, worker
from helpers.tiny import Tally, run, tiny_drafter, tiny_engine

from dspark.engine.drafting import DraftEngine
from dspark.engine.verifier import VerifierEngine
from dspark.rpc import draft_link
from dspark.rpc.pooled_draft_link import PooledDraftLink
from dspark.services.draft.servicer import DraftServicer
from dspark.types import Request, SamplingParams

REQUESTS = [
    Request(str(i), tuple(range(1, 4 + i)), SamplingParams(temperature=0.0, max_tokens=150))
    for i in range(4)
]


@asynccontextmanager
async def draft_replica() -> AsyncIterator[tuple[str, DraftEngine]]:
    with worker() as (made, engine):
        servicer = DraftServicer(
            made, engine, incarnation="d", drafter_fingerprint=WEIGHTS, max_streams=4
        )
        async with serving(servicer) as address:
            yield address, engine


@asynccontextmanager
async def pool_of(*addresses: str) -> AsyncIterator[PooledDraftLink]:
    link = PooledDraftLink("v", WEIGHTS, TARGET.vocab_size)
    link.set_peers(dict.fromkeys(addresses, 1.0))
    await connected(link, len(addresses))
    yield link
    await link.stop()


async def connected(link: PooledDraftLink, count: int) -> None:
    """Wait until so many streams are up."""

    def look() -> None:
        with link._state:
            assert link._state.wait_for(lambda: link.connected == count, 10)

    await asyncio.to_thread(look)


def engine_with(link: PooledDraftLink, requests: list[Request] = REQUESTS) -> VerifierEngine:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=link)
    for request in requests:
        engine.add(request)
    return engine


async def step_until(engine: VerifierEngine, tally: Tally, done: Callable[[], bool]) -> None:
    while not done():
        assert engine.has_work, "INCONCLUSIVE: the requests ended first"
        tally.add(await asyncio.to_thread(engine.step))


async def finish(engine: VerifierEngine, tally: Tally) -> None:
    while engine.has_work:
        tally.add(await asyncio.to_thread(engine.step))


def plain(requests: list[Request] = REQUESTS) -> dict[str, list[int]]:
    return run(tiny_engine(TARGET), requests).tokens


async def test_both_replicas_draft_and_one_goes_on_when_the_other_is_killed() -> None:
    async with AsyncExitStack() as doomed, draft_replica() as (second, survivor):
        first, victim = await doomed.enter_async_context(draft_replica())
        async with pool_of(first, second) as link:
            engine, tally = engine_with(link), Tally()
            both = [victim, survivor]
            await step_until(
                engine, tally, lambda: all(e.sessions == 2 for e in both) and tally.accepted > 0
            )
            await doomed.aclose()
            await connected(link, 1)
            lost = len(tally.results)
            await step_until(engine, tally, lambda: survivor.sessions == 4)
            await finish(engine, tally)
    drafted = {r.request_id for r in tally.results[lost:] if r.drafted}
    assert drafted == {r.id for r in REQUESTS}, "drafting went on for some only"
    assert tally.tokens == plain()


async def test_nothing_is_lost_when_all_replicas_go_and_others_come() -> None:
    async with AsyncExitStack() as doomed:
        addresses = [(await doomed.enter_async_context(draft_replica()))[0] for _ in range(2)]
        async with pool_of(*addresses) as link:
            engine, tally = engine_with(link), Tally()
            await step_until(engine, tally, lambda: tally.drafted > 0)
            await doomed.aclose()
            await connected(link, 0)
            assert not link.available
            for _ in range(5):
                tally.add(await asyncio.to_thread(engine.step))
            drafted = tally.drafted
            async with draft_replica() as (one, _), draft_replica() as (other, _):
                link.set_peers({one: 1.0, other: 1.0})
                await connected(link, 2)
                await finish(engine, tally)
                await link.stop()
    assert tally.drafted > drafted + 20
    assert tally.tokens == plain()


async def test_a_silent_replica_is_left_alone_and_the_other_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_link, "_FIRST_REST_S", 600.0)  # longer than the test
    async with (
        serving(Silent()) as silent,
        draft_replica() as (address, good),
        pool_of(silent, address) as link,
    ):
        engine, tally = engine_with(link), Tally()
        await step_until(engine, tally, lambda: good.sessions == len(REQUESTS))
        assert link.available
        before = len(tally.results)
        await finish(engine, tally)
    drafted = {r.request_id for r in tally.results[before:] if r.drafted}
    assert drafted == {r.id for r in REQUESTS}
    assert tally.tokens == plain()


async def test_requests_go_where_the_share_is_larger_and_stay_when_peers_are_added() -> None:
    requests = [
        Request(str(i), (i + 1, 2, 3), SamplingParams(temperature=0.0, max_tokens=100))
        for i in range(8)
    ]
    async with (
        draft_replica() as (large, much),
        draft_replica() as (small, little),
        draft_replica() as (added, nothing),
        pool_of(large, small) as link,
    ):
        link.set_peers({large: 0.75, small: 0.25})
        engine, tally = engine_with(link, requests), Tally()
        await step_until(engine, tally, lambda: much.sessions + little.sessions == 8)
        assert (much.sessions, little.sessions) == (6, 2)
        link.set_peers({large: 0.75, small: 0.25, added: 1.0})
        await connected(link, 3)
        late = Request("late", (9, 8), SamplingParams(temperature=0.0, max_tokens=20))
        engine.add(late)
        await step_until(engine, tally, lambda: nothing.sessions == 1)
        assert (much.sessions, little.sessions) == (6, 2)
        await finish(engine, tally)
    assert tally.tokens == plain([*requests, late])


async def test_without_peers_requests_decode_plainly() -> None:
    async with pool_of() as link:
        assert not link.available
        assert link.latency_s == 0.0
        tally = Tally()
        await finish(engine_with(link), tally)
    assert tally.drafted == 0
    assert tally.tokens == plain()
