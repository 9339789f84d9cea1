"""Leadership on one clock: never two at a time, rising epochs, and what an outage does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.errors import FencedError, NotLeaderError, UnavailableError
from dspark.services.scheduler.leadership import LEASE, Leadership, LeaderStore, StoreElection
from dspark.store import Holding, LeaseFence, MemoryStore

LEASE_S = 3.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Faulty:
    """A store's election over a bad network: slow both ways, deaf now and then, or out."""

    def __init__(self, store: MemoryStore, clock: Clock, goes_on: bool = False) -> None:
        self._honest, self._clock = StoreElection(store), clock
        self.leads_through_outage = goes_on
        self.out = False
        self.there_s = self.back_s = 0.0
        self.deaf = False  # the answer is lost, what was asked for is done

    async def acquire(
        self, holder: str, lease_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        self._clock.now += self.there_s
        if self.out:
            raise UnavailableError("scripted")
        holding = await self._honest.acquire(holder, lease_s, above=above, force=force)
        self._clock.now += self.back_s
        if self.deaf:
            raise UnavailableError("scripted")
        return holding

    async def release(self, holder: str) -> None:
        if self.out:
            raise UnavailableError("scripted")
        await self._honest.release(holder)


class World:
    """Schedulers that share a clock and a store; they stand for election when told to."""

    def __init__(self, count: int, *, sole: bool = False, goes_on: bool = False) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock, lambda: 1_800_000_000.0 + self.clock.now)
        self.elections = [Faulty(self.store, self.clock, goes_on) for _ in range(count)]
        self.schedulers = [
            Leadership(election, LEASE_S, sole=sole, clock=self.clock)
            for election in self.elections
        ]
        self.terms: list[list[int]] = [[] for _ in range(count)]

    async def start(self, i: int) -> None:
        async def elected(token: int) -> None:
            self.terms[i].append(token)

        await self.schedulers[i].start(f"s{i}:1", elected)

    async def stop(self) -> None:
        for scheduler in self.schedulers:
            await scheduler.stop()

    @property
    def leading(self) -> list[int]:
        return [i for i, one in enumerate(self.schedulers) if one.token is not None]


def scenario(check: Callable[[], object]) -> None:
    asyncio.run(check())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Act:
    kind: str
    who: int = 0
    there_s: float = 0.0
    back_s: float = 0.0
    fault: str = ""


WHO = st.integers(0, 2)
DELAYS = st.sampled_from([0.0, 0.1, 0.9, 2.9, 4.0])
ACTS = st.lists(
    st.one_of(
        st.builds(Act, st.just("stand"), WHO, DELAYS, DELAYS, st.sampled_from(["", "out", "deaf"])),
        st.builds(Act, st.just("wait"), st.just(0), st.sampled_from([0.3, 1.0, 2.5, 3.5])),
        st.builds(Act, st.just("plan"), WHO),
        st.builds(Act, st.just("stop"), WHO),
    ),
    max_size=60,
)


@given(ACTS)
@settings(max_examples=300, deadline=None)
def test_two_never_lead_at_a_time_and_epochs_rise(acts: list[Act]) -> None:
    async def check() -> None:
        world = World(3)
        for i in range(3):
            await world.start(i)
        newest = 0
        for act in acts:
            one, election = world.schedulers[act.who], world.elections[act.who]
            if act.kind == "wait":
                world.clock.now += act.there_s
            elif act.kind == "stand":
                election.there_s, election.back_s = act.there_s, act.back_s
                election.out, election.deaf = act.fault == "out", act.fault == "deaf"
                await one.stand()
                election.out = election.deaf = False
            elif act.kind == "stop":
                await one.stop()
            elif one.token is None:
                with pytest.raises(NotLeaderError):
                    one.next_epoch()
            else:
                epoch = one.next_epoch()
                assert epoch > newest
                newest = epoch
            assert len(world.leading) <= 1
        assert all(terms == sorted(set(terms)) for terms in world.terms)
        await world.stop()

    scenario(check)


def test_a_standby_knows_the_leader_and_follows_it_in_office() -> None:
    async def check() -> None:
        world = World(2)
        await world.start(0)
        await world.start(1)
        leader, standby = world.schedulers
        assert world.leading == [0]
        assert standby.leader == "s0:1"
        with pytest.raises(NotLeaderError, match="ask s0:1"):
            standby.require()
        world.clock.now += LEASE_S * 0.79  # the leader fell silent
        await standby.stand()
        assert world.leading == [0]
        world.clock.now += LEASE_S * 0.02
        await standby.stand()
        assert world.leading == []  # one has stopped, the other waits for the lease's own end
        assert leader.leader == ""  # it does not send anybody to itself
        world.clock.now += LEASE_S * 0.2
        await standby.stand()
        assert world.leading == [1]
        assert world.terms[1][0] > world.terms[0][0]
        await leader.stand()
        assert world.leading == [1]
        assert leader.leader == "s1:1"
        await standby.stop()
        await leader.stand()  # it was let in at once
        assert world.leading == [0]
        await world.stop()

    scenario(check)


def test_while_nobody_can_be_elected_the_leader_goes_on_and_no_other_begins() -> None:
    async def check() -> None:
        world = World(2, goes_on=True)
        await world.start(0)
        await world.start(1)
        for election in world.elections:
            election.out = True
        token = world.schedulers[0].token
        for _ in range(20):
            world.clock.now += LEASE_S / 3
            for one in world.schedulers:
                await one.stand()
            assert world.leading == [0]
        assert world.schedulers[0].token == token
        # Whoever was paused for longer than its lease cannot know: it waits for an election.
        world.clock.now += LEASE_S
        await world.schedulers[0].stand()
        assert world.leading == []
        for election in world.elections:
            election.out = False
        await world.schedulers[1].stand()
        await world.schedulers[0].stand()
        assert world.leading == [1]
        await world.stop()

    scenario(check)


def test_a_leader_that_alone_is_cut_off_is_followed_by_greater_epochs() -> None:
    async def check() -> None:
        world = World(2, goes_on=True)
        await world.start(0)
        await world.start(1)
        world.elections[0].out = True
        for _ in range(4):
            world.clock.now += LEASE_S / 3
            for one in world.schedulers:
                await one.stand()
        old, new = world.schedulers
        assert world.leading == [0, 1]
        assert old.next_epoch() < new.next_epoch()
        kept = LeaderStore(world.store, new)
        await kept.put("k", b"new", 9.0)
        with pytest.raises(NotLeaderError):
            await LeaderStore(world.store, old).put("k", b"old", 9.0)
        assert await kept.list("k") == {"k": b"new"}
        assert world.leading == [1]  # the refusal told it
        await world.stop()

    scenario(check)


def test_a_sole_scheduler_takes_over_at_once_and_its_predecessor_yields() -> None:
    async def check() -> None:
        world = World(2, sole=True)
        await world.start(0)
        await world.start(1)  # the first was not seen to end
        first, second = world.schedulers
        assert second.token is not None
        assert first.token is not None
        assert second.token > first.token
        await first.stand()
        assert world.leading == [1]
        for _ in range(10):  # nor does it come back while the other is there
            world.clock.now += LEASE_S / 3
            await second.stand()
            await first.stand()
            assert world.leading == [1]
        world.elections[0].out = True
        await first.stand()
        assert world.leading == [1]
        await world.stop()

    scenario(check)


def test_a_sole_scheduler_leads_without_a_store_and_is_elected_when_there_is_one() -> None:
    async def check() -> None:
        world = World(1, sole=True)
        (one,) = world.schedulers
        world.elections[0].out = True
        await world.store.acquire(LEASE, "of a predecessor", LEASE_S)
        await world.start(0)
        assert world.leading == [0]
        before = one.next_epoch()
        world.clock.now += 1.0
        world.elections[0].out = False
        await one.stand()
        assert world.leading == [0]
        assert one.next_epoch() > before
        await world.stop()

    scenario(check)


def test_a_leader_that_lost_the_race_to_read_does_not_lead() -> None:
    async def check() -> None:
        world = World(1)
        (one,) = world.schedulers

        async def overtaken(token: int) -> None:
            await world.store.put("x", b"", None, LeaseFence(LEASE, token + 1))
            await LeaderStore(world.store, one).take_over(token)

        with pytest.raises(FencedError):
            await one.start("s:1", overtaken)
        assert world.leading == []

    scenario(check)
