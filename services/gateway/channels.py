"""Open channels to verifiers, by address; those to replicas that are gone are closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from dspark.rpc.transport import PLAINTEXT, Transport


@dataclass(slots=True, eq=False)
class _Entry:
    channel: grpc.aio.Channel
    generation: int  # of the certificates that it was made with
    users: int = 0


class ChannelCache:
    """`current` names the addresses worth keeping a channel to while nobody uses it.

    Once certificates have changed, the next user gets a new channel; those before it go on.
    """

    def __init__(
        self, current: Callable[[], Collection[str]], transport: Transport = PLAINTEXT
    ) -> None:
        self._current, self._transport = current, transport
        self._entries: dict[str, _Entry] = {}
        self._replaced: set[_Entry] = set()  # closed by their last user

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel that is not closed before the block ends."""
        generation = self._transport.generation
        entry = self._entries.get(address)
        if entry is None or entry.generation != generation:
            if entry is not None:
                self._replaced.add(entry)
            entry = _Entry(self._transport.channel(address), generation)
            self._entries[address] = entry
        entry.users += 1
        try:
            await self._close_idle()
            yield entry.channel
        finally:
            entry.users -= 1
            await self._close_replaced()

    async def close(self) -> None:
        """Close all of them; calls under way are cancelled."""
        entries = [*self._entries.values(), *self._replaced]
        self._entries, self._replaced = {}, set()
        for entry in entries:
            await entry.channel.close()

    async def _close_idle(self) -> None:
        current = self._current()
        idle = [a for a, entry in self._entries.items() if not entry.users and a not in current]
        for entry in [self._entries.pop(address) for address in idle]:
            await entry.channel.close()
        await self._close_replaced()

    async def _close_replaced(self) -> None:
        unused = {entry for entry in self._replaced if not entry.users}
        self._replaced -= unused
        for entry in unused:
            await entry.channel.close()
