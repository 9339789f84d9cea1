"""Schedulers as processes over a real Redis: killed, paused, cut off, and started again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from helpers.redis_server import RedisServer, running_redis
from helpers.schedulers import Proxy, SchedulerProcess

from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.lease import LeaseKeeper
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.placement import Placement
from dspark.services.verifier.coordination import Coordinator
from dspark.types import Request, StepPlan, StepReport

BOUND_S = 60.0
HEARTBEAT_S, LEADER_LEASE_S = 0.2, 1.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as made:
        yield made


class Schedulers:
    """Processes, and the way that replicas find the leader: any of them is asked, in turn."""

    def __init__(self, stack: AsyncExitStack, url: str, replicas: int) -> None:
        self._stack, self._url, self._replicas = stack, url, replicas
        self.running: list[SchedulerProcess] = []
        self._turn = 0

    async def start(self, url: str = "") -> SchedulerProcess:
        settings = {
            "scheduler_replicas": self._replicas,
            "scheduler": {
                "store_url": url or self._url,
                "heartbeat_s": HEARTBEAT_S,
                "leader_lease_s": LEADER_LEASE_S,
            },
        }
        made = SchedulerProcess(settings)
        self._stack.push_async_callback(made.kill)
        self.running.append(await made.start())
        return made

    async def kill(self, one: SchedulerProcess) -> None:
        self.running.remove(one)
        await one.kill()

    async def locate(self) -> str:
        self._turn += 1
        return self.running[self._turn % len(self.running)].address


class Replica:
    """A lease, and what a heartbeat brought."""

    def __init__(self, schedulers: Schedulers, role: Any, name: str) -> None:
        self.name = name
        self.beat: pb.HeartbeatResponse | None = None
        self._heard = asyncio.Event()
        self.lease = LeaseKeeper(
            pb.Replica(
                role=role,
                incarnation=name,
                address=f"{name}:1",
                model="m",
                drafter_fingerprint="w",
                max_context_tokens=512,
            ),
            schedulers.locate,
            pb.Load,
            self._hear,
            HEARTBEAT_S,
        )

    def _hear(self, beat: pb.HeartbeatResponse) -> None:
        self.beat = beat
        self._heard.set()

    async def hears(self, condition: Callable[[pb.HeartbeatResponse], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while self.beat is None or not condition(self.beat):
                self._heard.clear()
                await self._heard.wait()

    async def beats_with(self, address: str) -> None:
        """Its heartbeats go to the scheduler at that address: that one knows it."""
        async with asyncio.timeout(BOUND_S), grpc.aio.insecure_channel(address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            while True:
                try:
                    seen = await stub.DescribeCluster(pb.DescribeClusterRequest())
                except grpc.aio.AioRpcError:
                    pass  # it stands by
                else:
                    fresh = [r for r in seen.replicas if r.silent_ms < HEARTBEAT_S * 1000]
                    if self.name in [r.replica.incarnation for r in fresh]:
                        return
                self._heard.clear()
                await self._heard.wait()


class Verifier(Replica):
    """A replica that follows plans."""

    def __init__(self, schedulers: Schedulers) -> None:
        super().__init__(schedulers, pb.ROLE_VERIFIER, "v")
        self.epochs: list[int] = []
        self._planned = asyncio.Event()
        self.channel: Callable[[], grpc.aio.Channel | None] = lambda: self.lease.channel
        self.coordinator = Coordinator("v", lambda: self.channel(), self._plan, lambda table: None)

    def _plan(self, plan: StepPlan) -> None:
        self.epochs.append(plan.epoch)
        self._planned.set()

    async def planned_beyond(self, epoch: int) -> int:
        async with asyncio.timeout(BOUND_S):
            while not self.epochs or self.epochs[-1] <= epoch:
                self._planned.clear()
                await self._planned.wait()
        return self.epochs[-1]

    async def planned_by_a_later_leader(self, epoch: int) -> int:
        return await self.planned_beyond(epoch | 0xFFFFFFFF)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


async def started(stack: AsyncExitStack, schedulers: Schedulers) -> tuple[Verifier, Replica]:
    """A verifier and a gateway at work."""
    verifier, gateway = Verifier(schedulers), Replica(schedulers, pb.ROLE_GATEWAY, "g")
    for one in (verifier, gateway):
        one.lease.start()
        stack.push_async_callback(one.lease.stop)
    verifier.coordinator.start()
    stack.push_async_callback(verifier.coordinator.stop)
    await gateway.hears(lambda beat: [v.incarnation for v in beat.verifiers] == ["v"])
    return verifier, gateway


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), str(trailing.get("dspark-leader"))


async def read_all(stream: Any, below: int) -> None:
    """Plans up to the stream's end, all of them of an earlier leader than the epoch's."""
    while True:
        assert (await stream.read()).epoch < below


async def leads(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    """Wait for the scheduler to be the leader; each look is a round trip, so this is no spin."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                await stub.DescribeCluster(pb.DescribeClusterRequest())
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


async def test_a_scheduler_that_stands_by_names_the_leader(
    stack: AsyncExitStack, redis: RedisServer
) -> None:
    schedulers = Schedulers(stack, redis.url, 2)
    leader, standby = await schedulers.start(), await schedulers.start()
    verifier, gateway = await started(stack, schedulers)  # whichever they asked
    await verifier.planned_beyond(0)
    async with grpc.aio.insecure_channel(standby.address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        beat = pb.HeartbeatRequest(replica=pb.Replica(role=pb.ROLE_GATEWAY, incarnation="x"))
        for call in (
            stub.Heartbeat(beat),
            stub.Place(pb.PlaceRequest(request_id="r", model="m")),
            stub.Coordinate().read(),
            stub.DescribeCluster(pb.DescribeClusterRequest()),
        ):
            assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, leader.address)
    await gateway.beats_with(leader.address)


async def test_a_killed_leader_is_followed_by_the_standby(
    stack: AsyncExitStack, redis: RedisServer
) -> None:
    schedulers = Schedulers(stack, redis.url, 2)
    leader, standby = await schedulers.start(), await schedulers.start()
    verifier, gateway = await started(stack, schedulers)
    before = await verifier.planned_beyond(0)
    await schedulers.kill(leader)
    after = await verifier.planned_by_a_later_leader(before)
    await verifier.beats_with(standby.address)
    await gateway.beats_with(standby.address)
    third = await schedulers.start()  # as Ray does
    await schedulers.kill(standby)
    await verifier.planned_by_a_later_leader(after)
    await gateway.beats_with(third.address)
    assert verifier.epochs == sorted(set(verifier.epochs))


async def test_a_paused_leader_has_no_say_when_it_wakes(
    stack: AsyncExitStack, redis: RedisServer
) -> None:
    schedulers = Schedulers(stack, redis.url, 2)
    leader, standby = await schedulers.start(), await schedulers.start()
    verifier, gateway = await started(stack, schedulers)
    before = await verifier.planned_beyond(0)
    old = await stack.enter_async_context(grpc.aio.insecure_channel(leader.address))
    stream = scheduler_pb2_grpc.SchedulerStub(old).Coordinate()
    assert (await stream.read()).epoch > before
    leader.pause()
    schedulers.running.remove(leader)
    after = await verifier.planned_by_a_later_leader(before)
    await gateway.beats_with(standby.address)
    leader.resume()
    # Its plans end, and whoever still asks it is sent on.
    code, _ = await refusal(read_all(stream, below=after))
    assert code is grpc.StatusCode.UNAVAILABLE
    place = pb.PlaceRequest(request_id="r", model="m")
    async with asyncio.timeout(BOUND_S):
        while (await refusal(scheduler_pb2_grpc.SchedulerStub(old).Place(place)))[
            1
        ] != standby.address:
            pass
    schedulers.running.append(leader)
    await verifier.beats_with(standby.address)


async def test_a_leader_that_is_cut_off_from_redis_is_outbid_by_epoch(
    stack: AsyncExitStack, redis: RedisServer, tmp_path: Path
) -> None:
    proxy = await Proxy(tmp_path, redis.socket).start()
    schedulers = Schedulers(stack, redis.url, 2)
    leader = await schedulers.start(proxy.url)
    standby = await schedulers.start()
    verifier, _ = await started(stack, schedulers)
    before = await verifier.planned_beyond(0)
    await proxy.cut()  # it cannot know that others can still be elected, and goes on
    schedulers.running.remove(leader)

    channel = await stack.enter_async_context(grpc.aio.insecure_channel(standby.address))
    await leads(scheduler_pb2_grpc.SchedulerStub(channel))
    verifier.channel = lambda: channel
    async with grpc.aio.insecure_channel(leader.address) as to_old:
        still = scheduler_pb2_grpc.SchedulerStub(to_old).Coordinate()
        assert (await still.read()).epoch >> 32 == before >> 32  # it leads, as far as it knows
        still.cancel()
        # The verifier has heard the new one, and then comes upon the old one again.
        await verifier.coordinator.stop()
        verifier.coordinator.start()
        await verifier.planned_by_a_later_leader(before)
        await verifier.coordinator.stop()
        heard = len(verifier.epochs)
        verifier.channel = lambda: to_old
        verifier.coordinator.start()
        describe = scheduler_pb2_grpc.SchedulerStub(to_old).DescribeCluster
        async with asyncio.timeout(BOUND_S):
            for step in itertools.count(1):
                verifier.coordinator.report(StepReport(step, 1, 0, 1, 0, 1, 0, 0, (), (), 1, 1, 1))
                seen = await describe(pb.DescribeClusterRequest())
                if any(report.plans_refused for report in seen.reports):
                    break
        assert len(verifier.epochs) == heard


async def test_a_sole_scheduler_that_was_killed_resumes_with_what_it_knew(
    stack: AsyncExitStack, redis: RedisServer
) -> None:
    schedulers = Schedulers(stack, redis.url, 1)
    first = await schedulers.start()
    verifier, gateway = await started(stack, schedulers)
    before = await verifier.planned_beyond(0)
    await verifier.lease.stop()  # only the store can tell the next scheduler of it
    await schedulers.kill(first)
    second = await schedulers.start()  # its predecessor's lease has not run out
    async with grpc.aio.insecure_channel(second.address) as channel:
        # The first answer counts: there was no heartbeat in between that could have helped.
        cluster = ClusterView("m")
        placed = await Placement(cluster, lambda: channel).place(Request("r", (1, 2)), "m", ())
        assert placed.incarnation == "v"
        plan = await scheduler_pb2_grpc.SchedulerStub(channel).Coordinate().read()
        assert plan.epoch >> 32 > before >> 32
    await gateway.beats_with(second.address)
    await gateway.hears(lambda beat: [v.incarnation for v in beat.verifiers] == ["v"])


async def test_a_redis_that_hangs_holds_no_heartbeat_up(
    stack: AsyncExitStack, redis: RedisServer
) -> None:
    schedulers = Schedulers(stack, redis.url, 2)
    leader, _ = await schedulers.start(), await schedulers.start()
    verifier, gateway = await started(stack, schedulers)
    await verifier.planned_beyond(0)
    redis.pause()
    for _ in range(10):  # over more than the leader's lease; each with less time than Redis has
        gateway.beat = verifier.beat = None
        await gateway.hears(lambda beat: [v.incarnation for v in beat.verifiers] == ["v"])
        await verifier.hears(lambda beat: True)
    await verifier.beats_with(leader.address)
    last = verifier.epochs[-1]
    assert await verifier.planned_beyond(last) >> 32 == last >> 32


async def test_a_dead_redis_costs_nothing(stack: AsyncExitStack, redis: RedisServer) -> None:
    schedulers = Schedulers(stack, redis.url, 2)
    leader, _ = await schedulers.start(), await schedulers.start()
    verifier, gateway = await started(stack, schedulers)
    redis.stop()
    last = await verifier.planned_beyond(0)
    for _ in range(2):  # plans come every few seconds: the leader's lease has long run out
        last = await verifier.planned_beyond(last)
    assert len({epoch >> 32 for epoch in verifier.epochs}) == 1
    await verifier.beats_with(leader.address)
    await gateway.hears(lambda beat: [v.incarnation for v in beat.verifiers] == ["v"])
    redis.start()
    await verifier.planned_beyond(last)
    await gateway.hears(lambda beat: [v.incarnation for v in beat.verifiers] == ["v"])
