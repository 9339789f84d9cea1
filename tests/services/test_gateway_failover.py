"""Verifiers break, fill up and vanish; the scheduler goes away. No token is lost or repeated.

The fake verifiers share an oracle that asserts that each prompt goes on exactly where the tokens
committed so far end.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from helpers.fake_services import FakeVerifier, Oracle, Script
from helpers.gateway import ANSWER, MODEL, Cluster, running_gateway

from dspark.pb import common_pb2
from dspark.pb import inference_pb2 as pb
from dspark.pb import verifier_pb2 as vp

REQUEST = pb.GenerateRequest(model=MODEL, text="hello")


async def generate(cluster: Cluster, request: pb.GenerateRequest = REQUEST) -> list[Any]:
    return [part async for part in cluster.stub.Generate(request)]


async def refusal(cluster: Cluster) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(cluster)
    return caught.value


def assert_whole(cluster: Cluster, parts: list[Any]) -> None:
    assert [t for part in parts for t in part.token_ids] == cluster.answer_ids
    assert "".join(part.text for part in parts) == ANSWER
    assert parts[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert parts[-1].usage.completion_tokens == len(cluster.answer_ids)


BREAKS = {
    "unavailable": Script(fail_at=3),
    "cancelled": Script(fail_at=2, code=grpc.StatusCode.CANCELLED),
    "crash": Script(fail_at=1, code=grpc.StatusCode.INTERNAL),
    "unknown": Script(fail_at=4, code=grpc.StatusCode.UNKNOWN),
    "another-model-there": Script(fail_at=0, code=grpc.StatusCode.NOT_FOUND),
    "early-end": Script(end_at=2),
    "before-the-first-token": Script(fail_at=0),
    "no-tokens": Script(replies=(vp.GenerateTokensResponse(),)),
    "more-accepted-than-sent": Script(
        replies=(vp.GenerateTokensResponse(token_ids=[1], accepted=2),)
    ),
    # Counting up to these would hold up the gateway for all.
    "a-block-past-all-bounds": Script(
        replies=(vp.GenerateTokensResponse(token_ids=[1], drafted=2**32 - 1),)
    ),
    "more-verified-than-drafted": Script(
        replies=(vp.GenerateTokensResponse(token_ids=[1], drafted=1, verified=2**32 - 1),)
    ),
    "more-accepted-than-verified": Script(
        replies=(vp.GenerateTokensResponse(token_ids=[1, 2], drafted=2, verified=1, accepted=2),)
    ),
}


@pytest.mark.parametrize("script", BREAKS.values(), ids=BREAKS)
async def test_a_broken_stream_goes_on_elsewhere(script: Script) -> None:
    async with running_gateway(verifiers=2) as cluster:
        first, second = cluster.verifiers
        first.scripts.append(script)
        assert_whole(cluster, await generate(cluster))
        (before,), (after,) = first.requests, second.requests
        committed = len(after.prompt_token_ids) - len(before.prompt_token_ids)
        assert committed == 3 * (script.fail_at or script.end_at or 0)
        assert (before.epoch, after.epoch) == (0, 1)
        assert before.request_id == after.request_id
        assert after.sampling.max_tokens == before.sampling.max_tokens - committed
        assert after.sampling.seed == before.sampling.seed
        assert list(cluster.scheduler.places[1].avoid_incarnations) == [first.incarnation]


async def test_an_aborted_generation_goes_on_elsewhere() -> None:
    async with running_gateway(verifiers=2) as cluster:
        given_up = vp.GenerateTokensResponse(
            token_ids=cluster.answer_ids[:2], finish_reason=common_pb2.FINISH_REASON_ABORT
        )
        cluster.verifier.scripts.append(Script(replies=(given_up,)))
        assert_whole(cluster, await generate(cluster))


async def test_a_killed_verifier_is_survived_mid_stream() -> None:
    async with running_gateway(verifiers=2) as cluster:
        first, second = cluster.verifiers
        first.scripts.append(Script(hold_at=4))
        generating = asyncio.create_task(generate(cluster))
        await asyncio.wait_for(first.held.wait(), 10)
        await first.kill()
        assert_whole(cluster, await generating)
        assert second.requests[0].epoch == 1


async def test_each_failure_raises_the_epoch() -> None:
    async with running_gateway(verifiers=1) as cluster:
        cluster.verifier.scripts.extend([Script(fail_at=1), Script(fail_at=0), Script(fail_at=2)])
        assert_whole(cluster, await generate(cluster))
        assert [request.epoch for request in cluster.verifier.requests] == [0, 1, 2, 3]


async def test_a_verifier_that_comes_back_later_is_waited_for() -> None:
    async with running_gateway(verifiers=1) as cluster:
        first = cluster.verifier
        first.scripts.append(Script(hold_at=2))
        generating = asyncio.create_task(generate(cluster))
        await asyncio.wait_for(first.held.wait(), 10)
        cluster.scheduler.verifiers.clear()
        cluster.scheduler.placed.clear()
        await first.kill()
        await asyncio.wait_for(cluster.scheduler.placed.wait(), 10)
        late = await FakeVerifier(
            first.answers, model=MODEL, stop_token_id=first.stop_token_id
        ).start()
        cluster.scheduler.verifiers.append(late)
        assert_whole(cluster, await generating)
        await late.kill()


async def test_the_search_ends_after_the_timeout() -> None:
    async with running_gateway(verifiers=1, resume_timeout_s=0.3) as cluster:
        cluster.verifier.scripts.extend([Script(fail_at=1), *[Script(fail_at=0)] * 50])
        received: list[int] = []

        async def receive() -> None:
            async for part in cluster.stub.Generate(REQUEST):
                received.extend(part.token_ids)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await receive()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "within 0.3 s" in caught.value.details()
        assert received == cluster.answer_ids[:3]
        cluster.verifier.scripts.clear()
        assert_whole(cluster, await generate(cluster))


async def test_a_request_that_crashes_verifiers_is_given_up() -> None:
    async with running_gateway(verifiers=2) as cluster:
        for verifier in cluster.verifiers:
            verifier.scripts.extend([Script(fail_at=0, code=grpc.StatusCode.INTERNAL)] * 3)
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "3 verifiers in a row" in error.details()
        assert sum(len(verifier.requests) for verifier in cluster.verifiers) == 3


async def test_a_request_at_fault_is_not_tried_elsewhere() -> None:
    async with running_gateway(verifiers=2) as cluster:
        cluster.verifier.scripts.append(
            Script(fail_at=0, code=grpc.StatusCode.INVALID_ARGUMENT, details="prompt too long here")
        )
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "prompt too long here" in error.details()
        assert not cluster.verifiers[1].requests


FULL = Script(fail_at=0, code=grpc.StatusCode.RESOURCE_EXHAUSTED, details="queue is full")


async def test_a_full_verifier_is_passed_over() -> None:
    async with running_gateway(verifiers=2) as cluster:
        cluster.verifier.scripts.append(FULL)
        assert_whole(cluster, await generate(cluster))
        (request,) = cluster.verifiers[1].requests
        assert request.epoch == 0  # nobody else can be at it


async def test_overload_passes_through_when_all_are_full() -> None:
    async with running_gateway(verifiers=2) as cluster:
        for verifier in cluster.verifiers:
            verifier.scripts.append(FULL)
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [len(verifier.requests) for verifier in cluster.verifiers] == [1, 1]


async def test_a_request_that_waited_in_vain_is_not_queued_again() -> None:
    async with running_gateway(verifiers=2) as cluster:
        late = (("dspark-code", "queue_timeout"), ("dspark-retry-after-s", "9"))
        cluster.verifier.scripts.append(replace(FULL, trailing=late))
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["dspark-retry-after-s"] == "9"
        assert not cluster.verifiers[1].requests


async def test_a_request_that_was_sent_away_waits_out_an_overload() -> None:
    async with running_gateway(verifiers=2) as cluster:
        first, second = cluster.verifiers
        first.scripts.extend([Script(fail_at=0), FULL])  # it drains, and is full afterwards
        second.scripts.extend([FULL, FULL])
        assert_whole(cluster, await generate(cluster))
        assert [place.let_in for place in cluster.scheduler.places][:2] == [False, True]


async def test_overload_said_by_the_scheduler_passes_through() -> None:
    async with running_gateway() as cluster:
        cluster.scheduler.refusals.append((grpc.StatusCode.RESOURCE_EXHAUSTED, "all are full"))
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "all are full"


async def test_a_begun_stream_waits_out_an_overload() -> None:
    async with running_gateway(verifiers=2) as cluster:
        first, second = cluster.verifiers
        first.scripts.extend([Script(fail_at=2), FULL])
        second.scripts.append(FULL)
        assert_whole(cluster, await generate(cluster))


async def test_without_scheduler_the_known_verifiers_serve() -> None:
    async with running_gateway(verifiers=2) as cluster:
        await cluster.scheduler.kill()
        for verifier in cluster.verifiers:
            verifier.scripts.append(Script(fail_at=2))  # whichever is chosen: the other goes on
        parts = await generate(cluster)
        assert_whole(cluster, parts)
        assert {len(verifier.requests) for verifier in cluster.verifiers} <= {1, 2}
        for _ in range(5):
            assert_whole(cluster, await generate(cluster))


async def test_a_restarted_scheduler_is_found_again() -> None:
    async with running_gateway() as cluster:
        await cluster.scheduler.kill()
        assert_whole(cluster, await generate(cluster))
        cluster.scheduler.places.clear()
        await cluster.scheduler.start()  # on another port
        cluster.scheduler.beats.clear()
        while not cluster.scheduler.places:
            assert_whole(cluster, await generate(cluster))


async def test_a_fresh_cluster_says_unavailable_soon() -> None:
    async with running_gateway(verifiers=0, wait=False, first_wait_s=0.2) as cluster:
        began = time.monotonic()
        error = await refusal(cluster)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "no verifier" in error.details()
        assert time.monotonic() - began < 5  # resume_timeout_s is 20


async def test_the_first_request_waits_a_moment_for_the_first_verifier() -> None:
    async with running_gateway(verifiers=0, wait=False, first_wait_s=20.0) as cluster:
        generating = asyncio.create_task(generate(cluster))
        late = await FakeVerifier(
            Oracle(cluster.answer_ids), model=MODEL, stop_token_id=cluster.answer_ids[-1]
        ).start()
        cluster.scheduler.verifiers.append(late)
        assert_whole(cluster, await generating)
        await late.kill()


async def test_cancelling_while_no_verifier_is_there_ends_the_search() -> None:
    async with running_gateway() as cluster:
        cluster.scheduler.verifiers.clear()
        call = cluster.stub.Generate(REQUEST)
        reading = asyncio.create_task(call.read())
        await asyncio.wait_for(cluster.scheduler.placed.wait(), 10)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await cluster.service.generator.drain(10)
        assert cluster.service.generator.in_flight == 0


async def test_stale_channels_are_closed_and_live_ones_kept() -> None:
    async with running_gateway(verifiers=2) as cluster:
        first, second = cluster.verifiers
        first.scripts.append(Script(fail_at=1))
        assert_whole(cluster, await generate(cluster))
        entries = cluster.service._router._channels._entries
        assert set(entries) == {first.address, second.address}
        cluster.scheduler.verifiers.remove(first)
        await cluster.scheduler.next_beats()
        assert_whole(cluster, await generate(cluster))
        assert set(entries) == {second.address}
