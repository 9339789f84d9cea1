"""Leases of both stores: one holder at a time, tokens that rise, and writes that they fence."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import redis.asyncio
from helpers.redis_server import RedisServer, running_redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark.errors import FencedError
from dspark.store import Holding, LeaseFence, MemoryStore, RedisStore, Store

LEASE = "l"
TTL_S = 60.0  # in no example does it run out by itself


class World(Protocol):
    """A store, and what can befall it."""

    store: Store

    async def expire(self) -> None: ...

    async def lose_all(self) -> None: ...

    async def close(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._now = 0.0
        self.store: Store = self._new()

    def _new(self) -> MemoryStore:
        return MemoryStore(lambda: self._now, lambda: 1_800_000_000.0)

    async def expire(self) -> None:
        self._now += TTL_S

    async def lose_all(self) -> None:
        self.store = self._new()

    async def close(self) -> None: ...


class RedisWorld:
    """Time cannot be moved in a real server: an end comes by command."""

    def __init__(self, server: RedisServer) -> None:
        self.store: Store = RedisStore(server.url)
        self._raw = redis.asyncio.Redis.from_url(server.url)

    async def expire(self) -> None:
        await self._raw.pexpire(f"dspark/lease/{LEASE}", 0)

    async def lose_all(self) -> None:
        await self._raw.flushall()

    async def close(self) -> None:
        await self._raw.flushall()
        await self._raw.aclose()
        await self.store.close()


@dataclass(frozen=True)
class Act:
    kind: str
    holder: str = ""
    force: bool = False


HOLDERS = st.sampled_from(["a", "b", "c"])
ACTS = st.lists(
    st.one_of(
        st.builds(Act, st.just("acquire"), HOLDERS, st.booleans()),
        st.builds(Act, st.sampled_from(["release", "write"]), HOLDERS),
        st.builds(Act, st.sampled_from(["expire", "lose_all"])),
    ),
    max_size=40,
)


async def check(world: World, acts: list[Act]) -> None:
    holding: Holding | None = None  # who has it, as a client must believe
    greatest = 0  # token ever granted
    heard = dict.fromkeys("abc", 0)  # by each
    own: dict[str, int] = {}  # token by which each held it last
    fence = 0  # the greatest that the store has seen since it lost its data
    for act in acts:
        if act.kind == "acquire":
            # What was lost is made up for by what the candidates have heard, as Leadership does.
            above = max(heard.values())
            got = await world.store.acquire(LEASE, act.holder, TTL_S, above=above, force=act.force)
            taken = holding is None or (act.force and holding.holder != act.holder)
            if taken:
                assert got.holder == act.holder
                assert got.token > greatest
                holding, greatest, fence = got, got.token, got.token
            assert got == holding
            heard[act.holder] = got.token
            if got.holder == act.holder:
                own[act.holder] = got.token
        elif act.kind == "release":
            await world.store.release(LEASE, act.holder)
            if holding is not None and holding.holder == act.holder:
                holding = None
        elif act.kind == "write" and act.holder in own:
            token = own[act.holder]
            key, value = f"k/{act.holder}", str(token).encode()
            if token < fence:
                with pytest.raises(FencedError, match="not written"):
                    await world.store.put(key, value, TTL_S, LeaseFence(LEASE, token))
            else:
                await world.store.put(key, value, TTL_S, LeaseFence(LEASE, token))
                assert (await world.store.list("k/"))[key] == value
                fence = token
        elif act.kind == "expire":
            await world.expire()
            holding = None
        elif act.kind == "lose_all":
            await world.lose_all()
            holding, fence = None, 0


@given(ACTS)
@settings(max_examples=300, deadline=None)
def test_a_lease_in_memory_has_one_holder_and_rising_tokens(acts: list[Act]) -> None:
    asyncio.run(check(MemoryWorld(), acts))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as made:
        yield made


@given(acts=ACTS)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_lease_in_redis_has_one_holder_and_rising_tokens(
    server: RedisServer, acts: list[Act]
) -> None:
    async def example() -> None:
        world = RedisWorld(server)
        try:
            await check(world, acts)
        finally:
            await world.close()

    asyncio.run(example())


async def test_of_many_at_once_one_takes_it(server: RedisServer) -> None:
    stores = [RedisStore(server.url) for _ in range(8)]
    seen = await asyncio.gather(
        *(store.acquire(LEASE, f"h{i}", TTL_S) for i, store in enumerate(stores))
    )
    assert len(set(seen)) == 1
    for store in stores:
        await store.close()


async def test_tokens_do_not_fall_back_with_a_redis_that_lost_everything(
    server: RedisServer,
) -> None:
    async def acquired(holder: str, above: int = 0) -> Holding:
        store = RedisStore(server.url)  # a connection of before would only find out
        got = await store.acquire(LEASE, holder, TTL_S, above=above)
        await store.close()
        return got

    first = await acquired("a")
    server.stop()
    server.start()
    heard = await acquired("b", above=first.token + 100)  # the clock is not what tells here
    assert heard.token == first.token + 101
    server.stop()
    server.start()
    assert (await acquired("c")).token >= first.token  # by the clock alone


async def test_a_fenced_value_expires_as_any(server: RedisServer) -> None:
    store = RedisStore(server.url)
    await store.put("k", b"1", TTL_S, LeaseFence(LEASE, 1))
    raw = redis.asyncio.Redis.from_url(server.url)
    assert 0 < await raw.pttl("dspark/k") <= TTL_S * 1000
    assert await raw.pttl(f"dspark/token/{LEASE}") == -1  # this one stays
    await raw.aclose()
    await store.close()
