"""Which of several schedulers leads, and what the others say meanwhile.

A leader holds a lease and renews it. It counts the lease from before it asked, and stops a margin
before the end: on one clock, two never lead at the same time while elections can be held. Where
they cannot, the leader may be allowed to go on, since no other can be chosen either; should only
the leader be cut off, the epochs of its plans and the fences of its writes tell who came later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol
from uuid import uuid4

from dspark.errors import FencedError, NotLeaderError, UnavailableError
from dspark.store import Holding, LeaseFence, Store, least_token

log = logging.getLogger(__name__)

LEASE = "scheduler"
_LEADER = "leader"  # key of the leader's address, for whoever looks into the store
_MARGIN = 0.2  # of the lease: a leader stops this much before the end
_RELEASE_S = 1.0
_COUNTER_BITS = 32


class Election(Protocol):
    """Where the lease is held."""

    leads_through_outage: bool  # whether a leader goes on while nobody can be elected

    async def acquire(
        self, holder: str, lease_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take the lease or renew it; who holds it then (`Store.acquire`). UnavailableError."""

    async def release(self, holder: str) -> None:
        """Give it back. UnavailableError."""


class StoreElection:
    """The lease is one of the store's. Without the store nobody can be elected."""

    leads_through_outage = True

    def __init__(self, store: Store) -> None:
        self._store = store

    async def acquire(
        self, holder: str, lease_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take the lease or renew it; who holds it then."""
        return await self._store.acquire(LEASE, holder, lease_s, above=above, force=force)

    async def release(self, holder: str) -> None:
        """Give it back."""
        await self._store.release(LEASE, holder)


class Leadership:
    """One scheduler's part in an election.

    `sole`: no other is meant to run, so it takes the lease from its predecessor at once, and leads
    without an election where none can be held; until one that was started later shows up.
    """

    def __init__(
        self,
        election: Election,
        lease_s: float,
        *,
        sole: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._election, self._lease_s, self._clock = election, lease_s, clock
        self._sole = sole
        self._elected = self._outage = False  # ever; at the last try
        self._holder = self._known = ""  # this one and the lease's, as address_random
        self._on_elected: Callable[[int], Awaitable[None]] | None = None
        self._token: int | None = None
        self._until = -math.inf
        self._heard = 0  # the greatest token
        self._plans = 0  # pushed, ever
        self._task: asyncio.Task[None] | None = None

    @property
    def token(self) -> int | None:
        """The fencing token while this one leads."""
        return self._token if self._clock() < self._until else None

    @property
    def leader(self) -> str:
        """host:port of the one that leads; empty if none is known to."""
        own = self._known == self._holder
        return "" if own and self.token is None else _address(self._known)

    @property
    def address(self) -> str:
        """host:port of this one."""
        return _address(self._holder)

    def require(self) -> int:
        """The token; NotLeaderError unless this one leads."""
        token = self.token
        if token is None:
            raise NotLeaderError(self.leader)
        return token

    def next_epoch(self) -> int:
        """A plan's: greater than all before it of any leader. NotLeaderError."""
        token = self.require()
        self._plans += 1
        # After 2**32 plans the sum runs into the tokens of the seconds after the election, which
        # are long past by then.
        return (token << _COUNTER_BITS) + self._plans

    async def start(self, address: str, on_elected: Callable[[int], Awaitable[None]]) -> None:
        """Stand for election, once before this returns and then until `stop`.

        `on_elected` gets the token, before anybody is told that this one leads.
        """
        self._holder, self._on_elected = f"{address}_{uuid4().hex}", on_elected
        await self.stand()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Lead no more, and let another be elected at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._token = None
        with suppress(UnavailableError, TimeoutError):  # then it runs out by itself
            await asyncio.wait_for(self._election.release(self._holder), _RELEASE_S)

    def step_down(self) -> None:
        """Another has been elected, as was heard from elsewhere."""
        if self._token is not None:
            log.warning("deposed: token %d is not the latest any more", self._token)
        self._token, self._sole = None, False

    async def stand(self) -> None:
        """Take, renew or look at the lease, once."""
        led, asked_at = self.token, self._clock()
        try:
            async with asyncio.timeout(self._lease_s / 3):
                holding = await self._election.acquire(
                    self._holder,
                    self._lease_s,
                    above=self._heard,
                    force=self._sole and not self._elected,
                )
                self._outage = False
        except (UnavailableError, TimeoutError) as error:
            goes_on = self._sole or (self._election.leads_through_outage and led is not None)
            if not self._outage:
                how = "leading on without" if goes_on else "waiting for"
                log.warning("%s an election: %s", how, str(error) or "no answer in time")
            self._outage = True
            if not goes_on:
                return
            token = self._token or max(self._heard + 1, least_token(time.time()))
            holding = Holding(self._holder, token)
        self._heard = max(self._heard, holding.token)
        self._known = holding.holder
        if holding.holder != self._holder:
            if self._token is not None:
                self.step_down()
            return
        self._elected |= not self._outage
        if holding.token != self._token:
            assert self._on_elected is not None  # by `start`
            self._token = None  # nobody is answered until what was kept has been read
            await self._on_elected(holding.token)
            self._token = holding.token
            log.info("leading by token %d", holding.token)
        self._until = asked_at + self._lease_s * (1 - _MARGIN)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self.stand()
            except Exception:  # the next try may do better, and meanwhile the lease runs out
                log.exception("standing for election failed")


def _address(holder: str) -> str:
    return holder.rpartition("_")[0]


class LeaderStore:
    """The store as the leader writes to it: fenced, so that one who was replaced cannot."""

    def __init__(self, store: Store, leadership: Leadership) -> None:
        self._store, self._leadership = store, leadership

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Set a value; NotLeaderError if another leads, UnavailableError without the store."""
        try:
            await self._store.put(key, value, ttl_s, LeaseFence(LEASE, self._leadership.require()))
        except FencedError as error:
            self._leadership.step_down()
            raise NotLeaderError(self._leadership.leader) from error

    async def take_over(self, token: int) -> None:
        """Refuse what earlier leaders still write, so that what is read next is the last of it.

        UnavailableError without the store; FencedError if a later leader was first.
        """
        await self._store.put(
            _LEADER, self._leadership.address.encode(), None, LeaseFence(LEASE, token)
        )

    async def list(self, prefix: str) -> dict[str, bytes]:
        """All values under a prefix."""
        return await self._store.list(prefix)
