"""What must outlive a process: a small key-value store, in process or in Redis.

A store that fails raises UnavailableError within a bounded time. Nothing waits for it that a
request waits for; callers go on from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from dspark.errors import ConfigError, UnavailableError

MAX_VALUE_BYTES = 1 << 20
_TIMEOUT_S = 1.0
_NAMESPACE = "dspark/"


class Store(Protocol):
    """Keys to bytes, with an optional time to live."""

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Set a value, replacing any."""

    async def delete(self, key: str) -> None:
        """Remove a value; an unknown key is nothing to do."""

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All values whose key starts with `prefix`."""

    async def close(self) -> None:
        """Let go of connections."""


class MemoryStore:
    """A store that lives as long as its process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, tuple[bytes, float]] = {}

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Set a value, replacing any."""
        _check_size(key, value)
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

    async def close(self) -> None:
        """Nothing to let go of."""


class RedisStore:
    """A store in Redis, under a namespace of ours."""

    def __init__(self, url: str) -> None:
        import redis.asyncio as redis

        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=None,  # a caller that goes on without is better than one that waits
            )
        except ValueError as error:
            # the URL itself stays out of the message: it may hold a password
            raise ConfigError(
                "the store's URL is not one of Redis: write redis://[user:password@]host:port/db, "
                "rediss://… for TLS, or unix://path"
            ) from error
        self._failure = redis.RedisError

    async def put(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Set a value, replacing any."""
        _check_size(key, value)
        milliseconds = None if ttl_s is None else max(1, round(ttl_s * 1000))
        try:
            await self._client.set(_NAMESPACE + key, value, px=milliseconds)
        except (self._failure, OSError, TimeoutError) as error:
            raise _unavailable(error) from error

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

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()


def open_store(url: str) -> Store:
    """The store that a URL names; an empty one means this process. ConfigError for a bad URL."""
    return RedisStore(url) if url else MemoryStore()


def _check_size(key: str, value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"{key}: {len(value)} bytes, more than the {MAX_VALUE_BYTES} allowed")


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(f"the store does not answer: {type(error).__name__}")


def _escape(text: str) -> str:
    """A literal text as a Redis pattern."""
    return "".join("\\" + c if c in "*?[]\\^" else c for c in text)
