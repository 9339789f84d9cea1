"""Verifier and draft service over a real stream: lossless, and undisturbed by what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
import torch
from helpers.draft_services import TARGET, WEIGHTS, Silent, draft_service, serving, worker
from helpers.tiny import Tally, run, tiny_causal_drafter, tiny_drafter, tiny_engine

from dspark.engine.autoregressive import AutoregressiveBlocks
from dspark.engine.drafting import Drafter
from dspark.engine.lookup import PromptLookup
from dspark.pb import draft_pb2 as pb
from dspark.pb import draft_pb2_grpc
from dspark.rpc import draft_link
from dspark.rpc.draft_link import PROTOCOL_VERSION, RemoteDraftLink
from dspark.services.draft.servicer import CREDITS, DraftServicer
from dspark.types import DraftWork, Fence, Request, SamplingParams
from dspark.wire.drafts import work_to_pb

REQUESTS = [
    Request(str(i), tuple(range(1, 4 + i)), SamplingParams(temperature=t, max_tokens=100, seed=i))
    for i, t in enumerate((0.0, 0.0, 1.0))
]
GREEDY = REQUESTS[:2]


@asynccontextmanager
async def link_to(address: str, weights: str = WEIGHTS) -> AsyncIterator[RemoteDraftLink]:
    link = RemoteDraftLink("v", weights, TARGET.vocab_size)
    link.start()
    link.set_peer(address)
    yield link
    await link.stop()


async def connected(link: RemoteDraftLink, up: bool = True) -> None:
    """Wait until the stream is up (or down)."""

    def look() -> None:
        with link._state:
            assert link._state.wait_for(lambda: link.connected is up, 10)

    await asyncio.to_thread(look)


async def generate(link: RemoteDraftLink, requests: list[Request] = REQUESTS) -> Tally:
    engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=link)
    return await asyncio.to_thread(run, engine, requests)


def plain(requests: list[Request] = GREEDY) -> dict[str, list[int]]:
    return run(tiny_engine(TARGET), requests).tokens


def greedy_part(tally: Tally) -> dict[str, list[int]]:
    return {r.id: tally.tokens[r.id] for r in GREEDY}


async def test_output_is_the_targets_and_drafts_are_accepted() -> None:
    async with draft_service() as address, link_to(address) as link:
        await connected(link)
        tally = await generate(link)
    assert tally.drafted > 0, "INCONCLUSIVE: nothing was drafted"
    assert tally.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    assert greedy_part(tally) == plain()


async def test_a_causal_lm_drafts_from_token_ids() -> None:
    def causal() -> Drafter:
        return AutoregressiveBlocks(tiny_causal_drafter())

    async with draft_service(drafter=causal) as address, link_to(address) as link:
        await connected(link)
        tally = await asyncio.to_thread(run, tiny_engine(TARGET, link=link), REQUESTS)
    assert tally.drafted > 0, "INCONCLUSIVE: nothing was drafted"
    assert tally.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    assert greedy_part(tally) == plain()


async def test_a_draft_service_that_restarts_is_found_again() -> None:
    async with draft_service() as address, link_to(address) as link:
        await connected(link)
        engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=link)
        tally = Tally()
        for request in GREEDY:
            engine.add(request)
        while tally.drafted == 0:
            tally.add(await asyncio.to_thread(engine.step))
        drafted = tally.drafted
        link.set_peer(None)
        await connected(link, up=False)
        for _ in range(5):  # nobody to draft: the verifier goes on
            tally.add(await asyncio.to_thread(engine.step))
        # another process at another address
        async with draft_service() as second:
            link.set_peer(second)
            await connected(link)
            while engine.has_work:
                tally.add(await asyncio.to_thread(engine.step))
            assert tally.drafted > drafted + 20
            assert tally.tokens == plain()
            await link.stop()


async def test_blocks_are_looked_up_while_the_draft_service_is_gone() -> None:
    one = Request("a", tuple(range(1, 9)), SamplingParams(temperature=0.0, max_tokens=400))
    drafted = dict.fromkeys(("served", "alone", "served again"), 0)

    async def step(phase: str, times: int) -> None:
        for _ in range(times):
            tally.add(await asyncio.to_thread(engine.step))
            drafted[phase] += tally.results[-1].drafted

    async with AsyncExitStack() as service:
        address = await service.enter_async_context(draft_service())
        async with link_to(address) as link:
            await connected(link)
            drafter = tiny_drafter(TARGET)
            engine = tiny_engine(TARGET, drafter, link=link, lookup=PromptLookup())
            tally = Tally()
            engine.add(one)
            await step("served", 10)
            await service.aclose()  # the engine's blocks under way are lost with it
            await connected(link, up=False)
            await step("alone", 2)
            drafted["alone"] = 0  # from here on no block can be the service's
            await step("alone", 40)
            with worker() as (made, held):
                servicer = DraftServicer(
                    made, held, incarnation="d", drafter_fingerprint=WEIGHTS, max_streams=4
                )
                async with serving(servicer, int(address.rsplit(":", 1)[1])):
                    await connected(link)
                    await step("served again", 10)
                    assert held.sessions == 1, "the service was not asked again"
                    while engine.has_work:
                        await step("served again", 1)
                    await link.stop()
    assert all(drafted.values()), f"INCONCLUSIVE: nothing was drafted at some time: {drafted}"
    assert tally.tokens == plain([one])


@pytest.mark.parametrize(
    ("first", "match"),
    [
        (pb.ConnectRequest(free=pb.FreeSessions()), "hello"),
        (pb.ConnectRequest(hello=pb.Hello(protocol_version=99)), "protocol version"),
        (
            pb.ConnectRequest(
                hello=pb.Hello(protocol_version=PROTOCOL_VERSION, drafter_fingerprint="other")
            ),
            "same checkpoint",
        ),
    ],
)
async def test_who_does_not_fit_is_refused(first: pb.ConnectRequest, match: str) -> None:
    async with draft_service() as address, grpc.aio.insecure_channel(address) as channel:
        call = draft_pb2_grpc.DraftStub(channel).Connect()
        await call.write(first)
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert match in (await call.details())


async def test_a_verifier_with_other_weights_decodes_plainly() -> None:
    async with draft_service() as address, link_to(address, weights="other") as link:
        tally = await generate(link, GREEDY)
    assert tally.drafted == 0
    assert tally.tokens == plain()


def work(session: str, anchor: int) -> pb.DraftWork:
    features = torch.zeros(1, 32)
    greedy = SamplingParams(temperature=0.0)
    return work_to_pb(DraftWork(Fence(session, 0, 0, 2), 0, features, anchor, 4, greedy))


@asynccontextmanager
async def raw_stream(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = draft_pb2_grpc.DraftStub(channel).Connect()
        hello = pb.Hello(protocol_version=PROTOCOL_VERSION, drafter_fingerprint=WEIGHTS)
        await call.write(pb.ConnectRequest(hello=hello))
        assert (await call.read()).welcome.credits == CREDITS
        yield call
        call.cancel()


async def test_one_bad_work_costs_nobody_else_anything() -> None:
    bad = work("bad", 1)
    bad.features = b"odd"
    async with draft_service() as address, raw_stream(address) as call:
        batch = pb.WorkBatch(sequence=1, works=[work("a", 1), bad, work("b", 2)])
        await call.write(pb.ConnectRequest(work=batch))
        reply = (await call.read()).reply
        assert reply.sequence == 1
        assert sorted(p.fence.session for p in reply.proposals) == ["a", "b"]


async def test_who_sends_more_than_its_credits_is_cut_off() -> None:
    with worker(start=False) as (made, engine):
        servicer = DraftServicer(
            made, engine, incarnation="d", drafter_fingerprint=WEIGHTS, max_streams=4
        )
        async with serving(servicer) as address, raw_stream(address) as call:
            for sequence in range(CREDITS + 1):
                batch = pb.WorkBatch(sequence=sequence, works=[work("a", 1)])
                await call.write(pb.ConnectRequest(work=batch))
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "unanswered" in (await call.details())
        made.start()
    assert not made.most_waiting(), "the work of a stream that has ended was done"


async def test_two_verifiers_may_use_one_name() -> None:
    async with (
        draft_service() as address,
        raw_stream(address) as first,
        raw_stream(address) as second,
    ):
        for call in (first, second):
            await call.write(
                pb.ConnectRequest(work=pb.WorkBatch(sequence=1, works=[work("same", 1)]))
            )
            assert len((await call.read()).reply.proposals) == 1
        await first.write(pb.ConnectRequest(free=pb.FreeSessions(sessions=["same"])))
        further = work("same", 3)
        further.feature_start, further.fence.committed_len = 1, 3
        batch = pb.ConnectRequest(work=pb.WorkBatch(sequence=2, works=[further]))
        await second.write(batch)
        assert len((await second.read()).reply.proposals) == 1
        await first.write(batch)  # its own session is gone: it is asked for everything
        assert [r.have_len for r in (await first.read()).reply.resyncs] == [0]


async def test_a_silent_draft_service_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_link, "_FIRST_REST_S", 600.0)  # longer than the test
    async with serving(Silent()) as address, link_to(address) as link:
        await connected(link)
        assert link.available
        tally = await generate(link, GREEDY)
        assert not link.available
        assert tally.drafted == 0
        assert tally.tokens == plain()


class Generous(draft_pb2_grpc.DraftServicer):
    """Gives more credits than anybody needs, and answers what nobody asked; reads nothing."""

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        await anext(request_iterator)
        welcome = pb.Welcome(draft="generous", block_size=4, credits=2**32 - 1)
        await context.write(pb.ConnectResponse(welcome=welcome))
        for sequence in range(1, 100):
            await context.write(pb.ConnectResponse(reply=pb.ReplyBatch(sequence=sequence)))
        resync = pb.ResyncRequest(session="last")
        await context.write(pb.ConnectResponse(reply=pb.ReplyBatch(resyncs=[resync])))
        await asyncio.Event().wait()


async def test_what_a_peer_does_not_read_is_not_piled_up_whatever_it_grants() -> None:
    greedy = SamplingParams(temperature=0.0)
    context = DraftWork(Fence("s", 0, 0, 2), 0, torch.zeros(1, 32), 1, 0, greedy)
    async with serving(Generous()) as address, link_to(address) as link:
        await connected(link)

        def take_all_in() -> None:
            with link._state:
                assert link._state.wait_for(lambda: bool(link._replies.resyncs), 10)

        await asyncio.to_thread(take_all_in)
        sent = 0
        while link.available and sent < 1000:
            link.submit([context])
            sent += 1
        assert 1 < sent <= draft_link._MOST_CREDITS


@pytest.mark.parametrize("turns", range(4))
async def test_a_link_that_is_given_a_peer_as_it_stops_does_stop(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resting = asyncio.Event()
    monkeypatch.setattr(draft_link.log, "warning", lambda *_: resting.set())
    link = RemoteDraftLink("v", WEIGHTS, TARGET.vocab_size)
    link.start()
    link.set_peer("127.0.0.1:1")  # where nobody listens
    await asyncio.wait_for(resting.wait(), 10)
    link.set_peer("127.0.0.1:2")
    for _ in range(turns):  # of the event loop
        await asyncio.sleep(0)
    await asyncio.wait_for(link.stop(), 5)
