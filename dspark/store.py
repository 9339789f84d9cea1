"""What must outlive a process: a small key-value store with leases, in process or in Redis.

A store that fails raises UnavailableError within a bounded time. Nothing waits for it that a
request waits for; callers go on from memory.

A lease has one holder at a time, and a fencing token that grows with each of them. A write that
bears a token is refused once a greater one was seen. Tokens start from the seconds since 2020, so
that they do not fall back when a store loses what it held.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dspark.errors import ConfigError, FencedError, UnavailableError

MAX_VALUE_BYTES = 1 << 20
_TIMEOUT_S = 1.0
_NAMESPACE = "dspark/"
_TOKENS_SINCE_S = 1_577_836_800  # 2020-01-01: whole seconds since then fit 32 bits until 2156


def least_token(now_s: float) -> int:
    """The least fencing token that may be given out at a time of the wall clock."""
    return max(1, int(now_s) - _TOKENS_SINCE_S)


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds a lease, and by which fencing token."""

    holder: str
    token: int


@dataclass(frozen=True, slots=True)
class LeaseFence:
    """Goes with a write: whose it is, by the lease's name and the writer's token."""

    lease: str
    token: int


class Store(Protocol):
    """Keys to bytes, with an optional time to live, and leases."""

    async def put(
        self, key: str, value: bytes, ttl_s: float | None = None, fence: LeaseFence | None = None
    ) -> None:
        """Set a value, replacing any; FencedError if a greater token of that lease was seen."""

    async def delete(self, key: str) -> None:
        """Remove a value; an unknown key is nothing to do."""

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All values whose key starts with `prefix`."""

    async def acquire(
        self, lease: str, holder: str, ttl_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take a lease that is free, or renew one's own; says who holds it then.

        A new holder's token is greater than `above` and than any before it. `force` takes the lease
        from whoever has it.
        """

    async def release(self, lease: str, holder: str) -> None:
        """Give a lease back; one that is not the holder's stays as it is."""

    async def close(self) -> None:
        """Let go of connections."""


class MemoryStore:
    """A store that lives as long as its process."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall_clock = clock, wall_clock
        self._values: dict[str, tuple[bytes, float]] = {}
        self._leases: dict[str, tuple[Holding, float]] = {}
        self._tokens: dict[str, int] = {}  # of each lease, the greatest seen

    async def put(
        self, key: str, value: bytes, ttl_s: float | None = None, fence: LeaseFence | None = None
    ) -> None:
        """Set a value, replacing any; FencedError if a greater token of that lease was seen."""
        _check_size(key, value)
        if fence is not None:
            if fence.token < self._tokens.get(fence.lease, 0):
                raise _fenced(key, fence)
            self._tokens[fence.lease] = fence.token
        until = float("inf") if ttl_s is None else self._clock() + ttl_s
        self._values[key] = (value, until)

    async def delete(self, key: str) -> None:
        """Remove a value."""
        self._values.pop(key, None)

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All live values under a prefix; expired ones are dropped here."""
        now = self._clock()
        self._values = {k: (v, until) for k, (v, until) in self._values.items() if until > now}
        return {k: v for k, (v, _) in self._values.items() if k.startswith(prefix)}

    async def acquire(
        self, lease: str, holder: str, ttl_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take a free lease or renew one's own; see Store."""
        now = self._clock()
        holding, until = self._leases.get(lease, (None, now))
        if holding is None or until <= now or (force and holding.holder != holder):
            latest = max(self._tokens.get(lease, 0), above)
            holding = Holding(holder, max(latest + 1, least_token(self._wall_clock())))
            self._tokens[lease] = holding.token
        if holding.holder == holder:
            self._leases[lease] = (holding, now + ttl_s)
        return holding

    async def release(self, lease: str, holder: str) -> None:
        """Give a lease back if it is the holder's."""
        if lease in self._leases and self._leases[lease][0].holder == holder:
            del self._leases[lease]

    async def close(self) -> None:
        """Nothing to let go of."""


# Lua runs as one: nobody else's command comes in between. Tokens are below 2**53, as Lua's numbers.
_PUT_FENCED = """
local latest = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
if latest > tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[2], ARGV[3])
if ARGV[2] == '' then redis.call('SET', KEYS[1], ARGV[1])
else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return 1
"""
_ACQUIRE = """
local held = redis.call('HMGET', KEYS[1], 'holder', 'token')
if held[1] and held[1] ~= ARGV[1] and ARGV[4] == '0' then return held end
if held[1] ~= ARGV[1] then
  local latest = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
  local now = tonumber(redis.call('TIME')[1]) - tonumber(ARGV[5])
  held = {ARGV[1], string.format('%.0f', math.max(latest + 1, tonumber(ARGV[3]) + 1, now))}
  redis.call('SET', KEYS[2], held[2])
  redis.call('HSET', KEYS[1], 'holder', held[1], 'token', held[2])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return held
"""
_RELEASE = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class RedisStore:
    """A store in Redis, under a namespace of ours."""

    def __init__(self, url: str, password_file: str = "") -> None:
        """`password_file`: read at each connection; the URL must then hold no password.

        Raises ConfigError for a URL that is none, holds a password beside the file, or a file that
        cannot be read.
        """
        import redis.asyncio as redis

        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=None,  # a caller that goes on without is better than one that waits
            )
        except ValueError:
            # The URL stays out of the message, and out of the log with what was wrong: a password
            # that is not percent-encoded is taken for a port, and repeated.
            raise ConfigError(
                "the store's URL is not one of Redis: write redis://[user:password@]host:port/db, "
                "rediss://… for TLS, or unix://path, with a password percent-encoded"
            ) from None
        if password_file:
            _take_password_from(self._client, Path(password_file))
        self._failure = redis.RedisError

    async def put(
        self, key: str, value: bytes, ttl_s: float | None = None, fence: LeaseFence | None = None
    ) -> None:
        """Set a value, replacing any; FencedError if a greater token of that lease was seen."""
        _check_size(key, value)
        milliseconds = None if ttl_s is None else _milliseconds(ttl_s)
        if fence is None:
            try:
                await self._client.set(_NAMESPACE + key, value, px=milliseconds)
            except (self._failure, OSError, TimeoutError) as error:
                raise _unavailable(error) from error
            return
        written = await self._script(
            _PUT_FENCED,
            (key, _token_key(fence.lease)),
            value,
            "" if milliseconds is None else milliseconds,
            fence.token,
        )
        if not written:
            raise _fenced(key, fence)

    async def delete(self, key: str) -> None:
        """Remove a value."""
        try:
            await self._client.delete(_NAMESPACE + key)
        except (self._failure, OSError, TimeoutError) as error:
            raise _unavailable(error) from error

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All values under a prefix."""
        try:
            pattern = _escape(_NAMESPACE + prefix) + "*"
            keys = [key async for key in self._client.scan_iter(match=pattern, count=1000)]
            values: list[Any] = await self._client.mget(keys) if keys else []
        except (self._failure, OSError, TimeoutError) as error:
            raise _unavailable(error) from error
        return {
            key.decode().removeprefix(_NAMESPACE): value
            for key, value in zip(keys, values, strict=True)
            if value is not None  # expired in between
        }

    async def acquire(
        self, lease: str, holder: str, ttl_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take a free lease or renew one's own; see Store."""
        held, token = await self._script(
            _ACQUIRE,
            (_lease_key(lease), _token_key(lease)),
            holder,
            _milliseconds(ttl_s),
            above,
            int(force),
            _TOKENS_SINCE_S,
        )
        return Holding(held.decode(), int(token))

    async def release(self, lease: str, holder: str) -> None:
        """Give a lease back if it is the holder's."""
        await self._script(_RELEASE, (_lease_key(lease),), holder)

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def _script(self, script: str, keys: tuple[str, ...], *arguments: Any) -> Any:
        named = [_NAMESPACE + key for key in keys]
        try:
            return await self._client.eval(script, len(named), *named, *arguments)
        except (self._failure, OSError, TimeoutError) as error:
            raise _unavailable(error) from error


def open_store(url: str, password_file: str = "") -> Store:
    """The store that a URL names; an empty one means this process. ConfigError for a bad URL."""
    return RedisStore(url, password_file) if url else MemoryStore()


def _take_password_from(client: Any, path: Path) -> None:
    """Have a client's connections authenticate by the file, as it is when each is made."""
    from redis.credentials import CredentialProvider

    settings = client.connection_pool.connection_kwargs
    if settings.pop("password", None):
        raise ConfigError(
            f"the store's URL holds a password, and so does {path}: take it out of the URL"
        )
    user = settings.pop("username", None)

    class PasswordFile(CredentialProvider):
        def get_credentials(self) -> Any:  # bytes will do, whatever redis says
            # What ends a file is no part of a password; what is within it may be.
            password = path.read_bytes().rstrip(b"\r\n")
            return (user, password) if user else (password,)

    provider = PasswordFile()
    try:
        provider.get_credentials()
    except OSError as error:
        raise ConfigError(
            f"the store's password cannot be read from {path}: {type(error).__name__}"
        ) from error
    settings["credential_provider"] = provider


def _lease_key(lease: str) -> str:
    return f"lease/{lease}"


def _token_key(lease: str) -> str:
    return f"token/{lease}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _check_size(key: str, value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"{key}: {len(value)} bytes, more than the {MAX_VALUE_BYTES} allowed")


def _fenced(key: str, fence: LeaseFence) -> FencedError:
    return FencedError(
        f"{key} was not written: the lease {fence.lease!r} has had a holder since token "
        f"{fence.token}"
    )


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(f"the store does not answer: {type(error).__name__}")


def _escape(text: str) -> str:
    """A literal text as a Redis pattern."""
    return "".join("\\" + c if c in "*?[]\\^" else c for c in text)
