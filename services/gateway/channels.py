"""Open channels to verifiers, by address; those to replicas that are gone are closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from dspark.rpc.options import channel_options


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    users: int = 0


class ChannelCache:
    """`current` names the addresses worth keeping a channel to while nobody uses it."""

    def __init__(self, current: Callable[[], Collection[str]]) -> None:
        self._current = current
        self._entries: dict[str, _Entry] = {}

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel that is not closed before the block ends."""
        entry = self._entries.get(address)
        if entry is None:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
            entry = self._entries[address] = _Entry(channel)
        entry.users += 1
        try:
            await self._close_idle()
            yield entry.channel
        finally:
            entry.users -= 1

    async def close(self) -> None:
        """Close all of them; calls under way are cancelled."""
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            await entry.channel.close()

    async def _close_idle(self) -> None:
        current = self._current()
        idle = [a for a, entry in self._entries.items() if not entry.users and a not in current]
        for entry in [self._entries.pop(address) for address in idle]:
            await entry.channel.close()
