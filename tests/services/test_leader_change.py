"""Output is the target's own while schedulers that lead are lost in mid-stream, and come back.

Every stream goes by the plans of three leaders, and by none in between. The first is cut off from
its store and from everybody, and leads on for all it knows; it says everything twice. The second is
killed. Then the first is found again, whose word must count for nothing, and at last a third.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from helpers.coordinated_verifier import WEIGHTS, CoordinatedVerifier, Part
from helpers.laws import fit_given_the_past, next_law
from helpers.lost_scheduler import LostScheduler
from helpers.redis_server import running_redis
from helpers.schedulers import Proxy, SchedulerProcess
from helpers.tables import flat_table
from helpers.tiny import hf_model, run, tiny_drafter, tiny_engine, tiny_target

from dspark.config import ServeConfig, ServiceClass, build
from dspark.engine import drafting
from dspark.engine.draft_link import LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.verifier import VerifierEngine
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.scheduling.calibration import CalibrationInUse
from dspark.scheduling.round_times import RoundTimes
from dspark.services.scheduler import plans, servicer
from dspark.types import DoubleArray, Request, SamplingParams, StepPlan, VerifyMode

BOUND_S = 60.0
# Of each comparison of laws. Seeds are fixed, but when a plan comes is not, and what sampled
# streams emit hangs on it: a false alarm may come, and go.
FALSE_ALARM = 1e-6
VOCAB, STREAMS, TOKENS = 8, 192, 384
CACHE_TOKENS = 98304
PROMPT = (3, 1, 4, 1, 5, 7, 2, 6)
CLASSES = {
    "floor": ServiceClass(weight=3.0, min_tokens_per_s=1500.0),
    "light": ServiceClass(weight=0.2),
    "default": ServiceClass(max_first_token_s=1e-3),
}
SAMPLED = (SamplingParams(max_tokens=TOKENS), SamplingParams(temperature=0.8, max_tokens=TOKENS))
KINDS = (
    *SAMPLED,
    SamplingParams(temperature=0.9, max_tokens=TOKENS, mode=VerifyMode.COUPLED),
    *SAMPLED,
    SamplingParams(temperature=0.0, max_tokens=TOKENS),
)
NAMES = ("", "floor", "light")


def settings(store_url: str, **engine: Any) -> dict[str, Any]:
    """A scheduler's."""
    scheduler = {"store_url": store_url, "leader_lease_s": BOUND_S, "lease_s": BOUND_S}
    return {"scheduler": scheduler, "engine": engine}


def leader_of(plan: StepPlan) -> int:
    return plan.epoch >> 32


async def saturated_draft(scheduler: str) -> None:
    """Have a scheduler know a draft replica that is asked for more than it can do."""
    draft = pb.Replica(
        role=pb.ROLE_DRAFT,
        incarnation="d",
        address="d:1",
        model="m",
        drafter_fingerprint=WEIGHTS,
    )
    load = pb.Load(busy_share=1.0, queued_works=9, works_per_s=1000.0)
    async with grpc.aio.insecure_channel(scheduler) as channel:
        beat = scheduler_pb2_grpc.SchedulerStub(channel).Heartbeat
        await beat(pb.HeartbeatRequest(replica=draft, load=load))


def every_kind() -> list[Request]:
    """In every class."""
    turns = [divmod(i, len(KINDS)) for i in range(STREAMS)]
    return [
        Request(
            str(i),
            PROMPT[: 2 + turn % 7],
            replace(KINDS[kind], seed=i),
            service_class=NAMES[turn % 3],
        )
        for i, (turn, kind) in enumerate(turns)
    ]


def everything_on() -> VerifierEngine:
    target = tiny_target(vocab=VOCAB)
    drafter = tiny_drafter(target)
    engine = tiny_engine(
        target,
        drafter,
        link=LocalDraftLink(DraftEngine(DSparkBlocks(drafter), num_pages=6144)),
        policy="adaptive",
        max_requests=STREAMS,
        cache_tokens=CACHE_TOKENS,
        classes=CLASSES,
    )
    engine.calibration = CalibrationInUse(drafter.config.block_size, WEIGHTS)
    # rows that cost something, so that there is something to weigh and to cut
    engine.table = flat_table((1, STREAMS), (1, 5), ((1.0, 1.2), (10.0, 14.0)))
    return engine


async def reported(address: str) -> pb.StepReport:
    """What the verifier reported to a leader; each look is a round trip, so this is no spin."""
    async with asyncio.timeout(BOUND_S), grpc.aio.insecure_channel(address) as channel:
        describe = scheduler_pb2_grpc.SchedulerStub(channel).DescribeCluster
        while True:
            seen = await describe(pb.DescribeClusterRequest())
            if seen.reports and seen.reports[0].step:
                return seen.reports[0]


# -- what came of it --------------------------------------------------------------------------


def tokens(parts: Iterable[Part]) -> int:
    return sum(len(part.result.token_ids) for part in parts)


def conclusive(parts: Iterable[Part], where: str) -> None:
    results = [part.result for part in parts]
    for name in ("drafted", "verified", "accepted"):
        assert any(getattr(r, name) for r in results), f"INCONCLUSIVE: nothing was {name} {where}"


def streams(parts: Iterable[Part], asked: list[Request]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {request.id: [] for request in asked}
    for part in parts:
        if part.result.request_id in out:
            out[part.result.request_id] += part.result.token_ids
    return out


def plain(asked: list[Request], emitted: dict[str, list[int]]) -> dict[str, list[int]]:
    """The same streams, so far, by decoding without drafts."""
    engine = tiny_engine(tiny_target(vocab=VOCAB), max_requests=STREAMS, cache_tokens=CACHE_TOKENS)
    longest = max(map(len, emitted.values()))
    again = [
        Request(r.id, r.prompt_token_ids, replace(r.sampling, max_tokens=longest))
        for r in asked
        if r.id in emitted
    ]
    made = run(engine, again).tokens
    return {name: made[name][: len(tokens)] for name, tokens in emitted.items()}


def laws_of(
    emitted: dict[str, list[int]], asked: list[Request], warmer: float = 1.0
) -> dict[str, Any]:
    """The target's, for each token, given all before it: [T, V] of each stream."""
    model, laws = hf_model(vocab=VOCAB), {}
    for request in asked:
        prompt = request.prompt_token_ids
        sampling = SamplingParams(temperature=warmer * request.sampling.temperature)
        law = next_law(model, torch.tensor([[*prompt, *emitted[request.id]]]), sampling)
        laws[request.id] = law[0, len(prompt) - 1 : -1].numpy()
    return laws


def fit(
    parts: Iterable[Part],
    laws: dict[str, DoubleArray],
    leader: int | None = None,
    after: int | None = None,
) -> float:
    """p-value of all tokens, or of those by one leader's plans in streams that had seen another's.

    Which those are is settled before they are drawn; a later choice would be biased by itself.
    """
    seen: dict[str, set[int]] = {name: set() for name in laws}
    at = dict.fromkeys(laws, 0)
    taken: list[int] = []
    theirs: list[DoubleArray] = []
    for part in parts:
        name, ids = part.result.request_id, part.result.token_ids
        if name not in laws:
            continue
        if leader is None or (leader == part.leader and after in seen[name]):
            taken += ids
            theirs.append(laws[name][at[name] : at[name] + len(ids)])
        seen[name].add(part.leader)
        at[name] += len(ids)
    return fit_given_the_past(taken, np.concatenate(theirs))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.mark.statistical
async def test_output_is_the_targets_while_leaders_change_in_mid_stream(
    stack: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "CANDIDATES", 5)
    # the gate, which would go by this machine's times, lets blocks through
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)
    # plans of schedulers in this process, which is the first one, lapse soon, but outlast a step
    monkeypatch.setattr(plans, "VALID_FOR_S", 2.0)
    monkeypatch.setattr(servicer, "RENEW_AFTER_S", 0.1)

    redis = stack.enter_context(running_redis(tmp_path))
    proxy = await Proxy(tmp_path, redis.socket).start()
    first = LostScheduler(build(ServeConfig, settings(proxy.url, policy="fixed", block_size=3)))
    second = SchedulerProcess(settings(redis.url, policy="adaptive", draft_by_request=True))
    third = SchedulerProcess(settings(redis.url, policy="off"))
    await first.start()
    stack.push_async_callback(first.stop)
    await saturated_draft(first.address)
    for process in (second, third):
        stack.push_async_callback(process.kill)

    reachable = first.address
    verifier = CoordinatedVerifier(everything_on(), lambda: reachable)
    stack.push_async_callback(verifier.stop)
    verifier.start()
    one = leader_of(await verifier.hears(lambda plan: True))
    asked = every_kind()
    added = [verifier.runner.add(request) for request in asked]
    parts = verifier.parts

    async def go_on(while_: Callable[[Part], bool], by: int) -> None:
        """Until streams have got so many tokens more on the average, in parts of that kind."""
        until = tokens(filter(while_, parts)) + by * STREAMS
        await verifier.runs_until(lambda: tokens(filter(while_, parts)) >= until)

    await go_on(lambda part: part.leader == one, 6)
    await verifier.hears(lambda plan: plan.max_blocks > 0)
    await go_on(lambda part: part.leader == one and part.max_blocks > 0, 6)

    await proxy.cut()
    await first.vanish()
    await asyncio.sleep(plans.VALID_FOR_S)  # the engine rests, and what it was told lapses
    await go_on(lambda part: part.leader == 0, 6)
    reachable = (await second.start()).address
    two = leader_of(await verifier.hears(lambda plan: leader_of(plan) > one))
    await go_on(lambda part: part.leader == two, 80)
    twice = (await reported(second.address)).plans_refused

    await second.kill()
    await go_on(lambda part: True, 4)
    await first.appear()
    reachable = first.address
    await first.servicer.plans_more(2)
    await go_on(lambda part: True, 4)
    await first.vanish()
    reachable = (await third.start()).address
    three = leader_of(await verifier.hears(lambda plan: leader_of(plan) > two))
    await go_on(lambda part: part.leader == three, 4)
    stale = (await reported(third.address)).plans_refused - twice

    assert all(future.exception() is None for future in added)
    assert twice > 0, "INCONCLUSIVE: no plan came twice"
    assert stale > 0, "INCONCLUSIVE: no stale plan was refused"
    leaders = [part.leader for part in parts if part.leader]
    assert leaders == sorted(leaders), "a stale plan was followed"
    for leader, by_whom in ((one, "by the first"), (0, "by nobody"), (two, "by the second")):
        conclusive(verifier.of(leader), by_whom)
    results = [part.result for part in verifier.of(two)]
    assert sum(r.verified for r in results) < sum(r.drafted for r in results), (
        "INCONCLUSIVE: the second's policy had nothing to weigh"
    )
    assert not any(part.result.verified for part in verifier.of(three)), "its policy is off"
    emitted = streams(parts, asked)
    for kind in range(len(KINDS)):
        theirs = [p for p in parts if int(p.result.request_id) % len(KINDS) == kind]
        conclusive(theirs, f"for {KINDS[kind]}")
    for name in emitted:
        leaders_seen = {part.leader for part in parts if part.result.request_id == name}
        assert leaders_seen == {0, one, two, three}, "INCONCLUSIVE: a stream missed a leader"

    certain = {r.id: emitted[r.id] for r in asked if not r.sampling.needs_law}
    assert certain == plain(asked, certain)
    sampled = [r for r in asked if r.sampling.needs_law]
    laws = laws_of(emitted, sampled)
    assert fit(parts, laws) > FALSE_ALARM
    for leader, after in ((one, one), (0, one), (two, one), (three, two)):
        assert fit(parts, laws, leader, after) > FALSE_ALARM
    assert fit(parts, laws_of(emitted, sampled, warmer=1.25)) < FALSE_ALARM, (
        "INCONCLUSIVE: too few tokens to tell the law from one a quarter warmer"
    )
