"""Stores: one contract for both, and a Redis that dies and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from traceback import format_exception

import pytest
import redis.asyncio as redis
from helpers.redis_server import RedisServer, running_redis

from dspark.errors import ConfigError, UnavailableError
from dspark.store import MAX_VALUE_BYTES, MemoryStore, RedisStore, Store, open_store

BOUND_S = 5.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as made:
        yield made


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    url = "" if request.param == "memory" else request.getfixturevalue("server").url
    made = open_store(url)
    yield made
    await made.close()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not await condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def test_values_are_put_listed_and_deleted(store: Store) -> None:
    await store.put("a/1", b"one")
    await store.put("a/2", b"two")
    await store.put("b/1", b"other")
    await store.put("a/1", b"uno")
    assert await store.list("a/") == {"a/1": b"uno", "a/2": b"two"}
    await store.delete("a/1")
    await store.delete("never there")
    assert await store.list("a/") == {"a/2": b"two"}


async def test_a_prefix_is_taken_literally(store: Store) -> None:
    await store.put("a*[x]?/1", b"1")
    await store.put("abx/1", b"2")
    assert await store.list("a*[x]?") == {"a*[x]?/1": b"1"}


async def test_values_with_a_time_to_live_expire(store: Store) -> None:
    await store.put("a/1", b"short", ttl_s=0.05)
    await store.put("a/2", b"long", ttl_s=60.0)

    async def expired() -> bool:
        return await store.list("a/") == {"a/2": b"long"}

    await eventually(expired)


async def test_values_are_bounded(store: Store) -> None:
    with pytest.raises(ValueError, match="more than"):
        await store.put("a", b"x" * (MAX_VALUE_BYTES + 1))


async def test_memory_follows_its_clock() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    await store.put("a", b"1", ttl_s=5.0)
    now = 4.9
    assert await store.list("") == {"a": b"1"}
    now = 5.1
    assert await store.list("") == {}


async def test_a_dead_redis_is_unavailable_and_a_new_one_is_used(server: RedisServer) -> None:
    store = RedisStore(server.url)
    await store.put("a", b"1")
    server.stop()
    started = time.monotonic()
    for call in (store.put("a", b"2"), store.list(""), store.delete("a")):
        with pytest.raises(UnavailableError, match="does not answer"):
            await call
    assert time.monotonic() - started < BOUND_S
    server.start()

    async def answers() -> bool:
        try:
            await store.put("b", b"3")
        except UnavailableError:
            return False
        return True

    await eventually(answers)
    assert await store.list("") == {"b": b"3"}
    await store.close()


@pytest.mark.parametrize("url", ["http://user:secret@host:1", "redis://:secret/more@host:1"])
def test_a_bad_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="redis://") as caught:
        open_store(url)
    assert "secret" not in "".join(format_exception(caught.value))  # as logged, with its causes


async def test_the_password_is_that_of_the_file_at_each_connection(
    server: RedisServer, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    admin = redis.Redis.from_url(server.url)
    await admin.config_set("requirepass", "first pass")
    secret.write_text("first pass\n")
    kept = RedisStore(server.url, str(secret))
    named = RedisStore(server.url.replace("://", "://default@"), str(secret))
    await kept.put("a", b"1")
    assert await named.list("a") == {"a": b"1"}
    without = RedisStore(server.url)
    with pytest.raises(UnavailableError):
        await without.list("a")
    await without.close()

    await admin.config_set("requirepass", "second")
    await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(UnavailableError):
        await kept.list("a")
    secret.write_text("second")
    assert await kept.list("a") == {"a": b"1"}
    await admin.config_set("requirepass", "")
    await kept.close()
    await named.close()
    await admin.aclose()


def test_a_password_has_one_place_and_stays_out_of_messages(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    with pytest.raises(ConfigError, match="cannot be read"):
        RedisStore("redis://127.0.0.1:1", str(secret))
    secret.write_text("hush")
    with pytest.raises(ConfigError, match="take it out of the URL") as raised:
        RedisStore("redis://u:loud@127.0.0.1:1", str(secret))
    assert "hush" not in str(raised.value)
    assert "loud" not in str(raised.value)
