"""A verifier's stream to a draft replica (protos/draft.proto).

The engine's thread submits and collects; the event loop owns the stream. Losing the stream, a late
reply or a full window costs blocks, never a token: what was not sent leaves a gap that the draft
side answers with a resync request, and a request without a block decodes plainly.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from dspark.engine.draft_link import CATCH_UP_ROWS, DraftReplies, on_host
from dspark.errors import ProtocolError
from dspark.pb import draft_pb2 as pb
from dspark.pb import draft_pb2_grpc
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.types import DraftWork, Fence
from dspark.wire.drafts import proposal_from_pb, resync_from_pb, work_to_pb

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1

FIRST_DEADLINE_S = 0.5  # before anything has been measured
_SHORTEST_DEADLINE_S = 0.01
_DEADLINE_FACTOR = 4.0  # of the usual latency
_LATENCY_WEIGHT = 0.1  # of the newest in the running mean
_MISSES_TO_OPEN = 3  # deadlines missed in a row before the link is left alone for a while
_FIRST_REST_S = 0.25
_LONGEST_REST_S = 8.0
_WELCOME_TIMEOUT_S = 5.0
_RECONNECT_S = (0.1, 2.0)  # first and longest pause
_MAX_BATCH_BYTES = 8 * 1024 * 1024
_MOST_CREDITS = 16  # whatever a welcome says: what a peer does not read is kept here


@dataclass(frozen=True, slots=True)
class _Asked:
    """Blocks that one batch wants."""

    at: float
    fences: frozenset[Fence]


class RemoteDraftLink:
    """A DraftLink over gRPC. Make it on the event loop that will run the stream."""

    def __init__(
        self,
        verifier: str,
        drafter_fingerprint: str,
        vocab_size: int,
        *,
        state: threading.Condition | None = None,  # None: its own; reentrant where links share one
        transport: Transport = PLAINTEXT,
    ) -> None:
        self._hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            verifier=verifier,
            drafter_fingerprint=drafter_fingerprint,
        )
        self._vocab_size, self._transport = vocab_size, transport
        self._loop = asyncio.get_running_loop()
        self._address: str | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # What both sides touch, under one lock.
        self._state = state or threading.Condition()
        self._outgoing: asyncio.Queue[pb.ConnectRequest] | None = None  # None: no stream
        self._credits = self._most_credits = 0
        self._sequence = 0
        self._asked: dict[int, _Asked] = {}  # by batch, of batches that want blocks
        self._replies = DraftReplies()
        self._latency_s = 0.0
        self._news = False  # a reply, or the stream's end, since the last look
        self._misses = 0
        self._rest_s = _FIRST_REST_S
        self._rest_until = 0.0

    # -- the engine's thread --------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether a stream is up, has room, and has not been late several times in a row."""
        with self._state:
            return self.usable and self._credits > 0

    @property
    def usable(self) -> bool:
        """The same of one that may be full for the moment."""
        with self._state:
            return self._outgoing is not None and time.monotonic() >= self._rest_until

    @property
    def awaited(self) -> bool:
        """Whether blocks are under way."""
        with self._state:
            return bool(self._asked)

    @property
    def has_news(self) -> bool:
        """Whether replies came, or blocks were lost, since the last `collect`."""
        with self._state:
            return self._news

    @property
    def latency_s(self) -> float:
        """Running mean of the time from submitting work to its blocks; 0 before the first."""
        with self._state:
            return self._latency_s

    @property
    def catch_up_rows(self) -> int:
        """The usual: each is some kilobytes to send."""
        return CATCH_UP_ROWS

    @property
    def deadline_s(self) -> float:
        """Some times the latency."""
        with self._state:
            return self._deadline_s()

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Send one round's work."""
        self.send(on_host(works))

    def send(self, works: Sequence[DraftWork]) -> None:
        """Send work that is on the host, in batches of bounded size."""
        batch: list[pb.DraftWork] = []
        size = 0
        fences: set[Fence] = set()
        for work in works:
            message = work_to_pb(work)
            if batch and size + message.ByteSize() > _MAX_BATCH_BYTES:
                self._send_batch(batch, fences)
                batch, size, fences = [], 0, set()
            batch.append(message)
            size += message.ByteSize()
            if work.block_size:
                fences.add(work.fence)
        if batch:
            self._send_batch(batch, fences)

    def free(self, sessions: Iterable[str]) -> None:
        """Tell the draft side to forget sessions."""
        with self._state:
            self._send(pb.ConnectRequest(free=pb.FreeSessions(sessions=list(sessions))))

    def collect(self, wait_s: float) -> DraftReplies:
        """Replies so far; if there are none, waits for the next or the stream's end."""
        with self._state:
            if self._asked:
                self._state.wait_for(lambda: self._news, wait_s)
            self._news = False
            replies, self._replies = self._replies, DraftReplies()
            replies.pending = frozenset().union(*(asked.fences for asked in self._asked.values()))
            return replies

    def missed(self, sessions: Iterable[str]) -> None:
        """Count deadlines missed in a row; too many, and the link rests, longer each time."""
        with self._state:
            self._misses += 1
            if self._misses >= _MISSES_TO_OPEN and self._outgoing is not None:
                self._rest_until = time.monotonic() + self._rest_s
                self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
                self._misses = 0

    def _deadline_s(self) -> float:
        if not self._latency_s:
            return FIRST_DEADLINE_S
        return min(max(_DEADLINE_FACTOR * self._latency_s, _SHORTEST_DEADLINE_S), FIRST_DEADLINE_S)

    def _send_batch(self, works: list[pb.DraftWork], fences: set[Fence]) -> None:
        with self._state:
            if self._credits <= 0:
                return  # the gap that this leaves is answered by resync requests
            self._credits -= 1
            self._sequence += 1
            if fences:
                self._asked[self._sequence] = _Asked(time.perf_counter(), frozenset(fences))
            self._send(pb.ConnectRequest(work=pb.WorkBatch(sequence=self._sequence, works=works)))

    def _send(self, message: pb.ConnectRequest) -> None:
        if self._outgoing is not None:
            self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)

    # -- the event loop -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to keep a stream to whatever peer is set."""
        self._task = asyncio.create_task(self._keep_connected())

    async def stop(self) -> None:
        """Close the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def set_peer(self, address: str | None) -> None:
        """Connect to this draft replica from now on; None: to nobody."""
        if address != self._address:
            self._address = address
            self._changed.set()

    @property
    def address(self) -> str | None:
        """The draft replica that it keeps a stream to."""
        return self._address

    @property
    def connected(self) -> bool:
        """Whether a stream is up."""
        with self._state:
            return self._outgoing is not None

    async def _keep_connected(self) -> None:
        pause = _RECONNECT_S[0]
        while True:
            self._changed.clear()
            address = self._address
            if address is None:
                await self._changed.wait()
                continue
            session = asyncio.create_task(self._session(address))
            changed = asyncio.create_task(self._changed.wait())
            started = time.monotonic()
            try:
                await asyncio.wait({session, changed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                session.cancel()
                changed.cancel()
                outcome = (await asyncio.gather(session, changed, return_exceptions=True))[0]
                self._down()
            log.warning("stream to draft %s ended: %s", address, _reason(outcome))
            if time.monotonic() - started > 2 * _RECONNECT_S[1]:
                pause = _RECONNECT_S[0]
            try:
                # wait_for of Python 3.11 loses a cancellation that comes with the event.
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                pause = min(2 * pause, _RECONNECT_S[1])

    async def _session(self, address: str) -> None:
        """One stream, from hello to its end."""
        async with self._transport.channel(address) as channel:
            call = draft_pb2_grpc.DraftStub(channel).Connect()
            try:
                await call.write(pb.ConnectRequest(hello=self._hello))
                async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                    first = await call.read()
                if first is grpc.aio.EOF or not first.HasField("welcome"):
                    raise ProtocolError(f"{address} did not answer the hello with a welcome")
                outgoing = self._up(first.welcome)
                log.info("stream to draft %s is up", address)
                writer = asyncio.create_task(_write(call, outgoing))
                try:
                    await self._read(call)
                finally:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
            finally:
                call.cancel()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return
            if message.HasField("reply"):
                self._take(message.reply)

    def _take(self, reply: pb.ReplyBatch) -> None:
        proposals = []
        for message in reply.proposals:
            try:
                proposals.append(proposal_from_pb(message, self._vocab_size))
            except ProtocolError as error:  # costs this request one block
                log.warning("a draft proposal was dropped: %s", error)
        with self._state:
            self._credits = min(self._credits + 1, self._most_credits)
            self._rest_until = 0.0  # it answers, however late
            self._news = True
            asked = self._asked.pop(reply.sequence, None)
            if asked is not None:
                took = time.perf_counter() - asked.at
                if took <= self._deadline_s():
                    self._misses, self._rest_s = 0, _FIRST_REST_S
                old = self._latency_s or took
                self._latency_s = old + _LATENCY_WEIGHT * (took - old)
            self._replies.proposals.extend(proposals)
            self._replies.resyncs.extend(resync_from_pb(r) for r in reply.resyncs)
            self._state.notify_all()

    def _up(self, welcome: pb.Welcome) -> asyncio.Queue[pb.ConnectRequest]:
        outgoing: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
        with self._state:
            self._outgoing = outgoing
            self._credits = self._most_credits = min(max(1, welcome.credits), _MOST_CREDITS)
            self._asked.clear()
            self._misses, self._rest_until, self._rest_s = 0, 0.0, _FIRST_REST_S
            self._state.notify_all()
        return outgoing

    def _down(self) -> None:
        with self._state:
            self._outgoing = None
            self._credits = 0
            self._news = True
            self._asked.clear()
            self._state.notify_all()


async def _write(
    call: grpc.aio.StreamStreamCall, outgoing: asyncio.Queue[pb.ConnectRequest]
) -> None:
    while True:
        await call.write(await outgoing.get())


def _reason(outcome: object) -> str:
    if isinstance(outcome, grpc.aio.AioRpcError):
        return f"{outcome.code().name}: {outcome.details()}"
    if isinstance(outcome, asyncio.CancelledError):
        return "another peer was assigned"
    return repr(outcome) if isinstance(outcome, BaseException) else "closed by the draft side"
