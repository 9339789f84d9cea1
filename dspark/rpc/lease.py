"""A replica's lease with the scheduler: a heartbeat that registers, renews, and finds it again.

The scheduler's address is looked up anew after every failure, since a restarted scheduler listens
elsewhere. One that stands by says who leads, and is left for that one at once. While no leader
answers the replica goes on with what it last heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc

from dspark.errors import NotLeaderError, UnavailableError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.status import from_rpc_error
from dspark.rpc.transport import PLAINTEXT, Transport

log = logging.getLogger(__name__)

Locate = Callable[[], Awaitable[str]]

_MAX_DIALS = 3  # in a row, since the word of those that stand by may be old


class LeaseKeeper:
    """Beats until stopped. `locate` finds the scheduler; `on_beat` gets what it says."""

    def __init__(
        self,
        replica: pb.Replica,
        locate: Locate,
        load: Callable[[], pb.Load],
        on_beat: Callable[[pb.HeartbeatResponse], None],
        interval_s: float,
        *,
        transport: Transport = PLAINTEXT,
    ) -> None:
        self._replica, self._locate, self._load = replica, locate, load
        self._on_beat, self._interval_s = on_beat, interval_s
        self._transport = transport
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel | None:
        """The channel to the scheduler that last answered; None while it is away."""
        return self._channel

    def start(self) -> None:
        """Begin to beat on the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def drain(self) -> None:
        """Tell the scheduler, once and now, to send nothing new."""
        self._draining = True
        if self._channel is not None:
            try:
                await self._beat(self._channel)
            except grpc.aio.AioRpcError as error:
                log.warning("could not announce draining: %s", error.details())
            except asyncio.CancelledError:
                # A heartbeat that failed meanwhile has closed the channel, and this call with it.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                log.warning("could not announce draining: the scheduler was lost meanwhile")

    async def stop(self) -> None:
        """Stop beating; the lease runs out by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._let_go()

    async def _run(self) -> None:
        while True:
            try:
                await self._renew()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the locator is Ray's and may raise anything
                log.warning("scheduler out of reach, going on without: %s", _reason(error))
                await self._let_go()
            await asyncio.sleep(self._interval_s)

    async def _renew(self) -> None:
        """Beat once, going where the leader is said to be."""
        if self._channel is not None:
            leader = await self._beat(self._channel)
            if not leader:
                return
            await self._let_go()
        else:
            async with asyncio.timeout(2 * self._interval_s):
                leader = await self._locate()
        for _ in range(_MAX_DIALS):
            channel = self._transport.channel(leader)
            try:
                leader = await self._beat(channel)
            except BaseException:
                await channel.close()
                raise
            if not leader:
                self._channel = channel
                return
            await channel.close()
        raise UnavailableError("one scheduler sends us to another: none leads yet")

    async def _let_go(self) -> None:
        channel_lost, self._channel = self._channel, None
        if channel_lost is not None:
            await channel_lost.close()

    async def _beat(self, channel: grpc.aio.Channel) -> str:
        """Empty if the scheduler took it, else where it says that the leader is."""
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        request = pb.HeartbeatRequest(
            replica=self._replica, load=self._load(), draining=self._draining
        )
        try:
            answer = await stub.Heartbeat(request, timeout=2 * self._interval_s)
        except grpc.aio.AioRpcError as error:
            meant = from_rpc_error(error)
            if isinstance(meant, NotLeaderError) and meant.leader:
                return meant.leader
            raise
        self._on_beat(answer)
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.details() or error.code().name)
    return str(error) or type(error).__name__
