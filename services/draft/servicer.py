"""dspark.v1.Draft over a DraftWorker: decode, hand over, encode."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from dspark.engine.drafting import DraftEngine
from dspark.errors import OverloadedError, ProtocolError
from dspark.pb import draft_pb2 as pb
from dspark.pb import draft_pb2_grpc
from dspark.rpc.draft_link import PROTOCOL_VERSION
from dspark.rpc.status import abort
from dspark.services.draft.worker import DraftWorker
from dspark.types import BlockProposal, DraftWork, ResyncRequest
from dspark.wire.bounds import MAX_WORKS
from dspark.wire.drafts import proposal_to_pb, resync_to_pb, work_from_pb

log = logging.getLogger(__name__)

CREDITS = 4


@dataclass(slots=True, eq=False)
class _Stream:
    """One verifier's."""

    client: int
    unanswered: int = 0  # batches
    outgoing: asyncio.Queue[pb.ReplyBatch] = field(default_factory=asyncio.Queue)

    def answer(self, reply: pb.ReplyBatch) -> None:
        self.unanswered -= 1
        self.outgoing.put_nowait(reply)


class DraftServicer(draft_pb2_grpc.DraftServicer):
    """One stream a verifier."""

    def __init__(
        self,
        worker: DraftWorker,
        engine: DraftEngine,
        *,
        incarnation: str,
        drafter_fingerprint: str,
        max_streams: int,
    ) -> None:
        self._worker = worker
        self._block_size = engine.drafter.block_size
        self._width = engine.drafter.feature_width
        self._vocab_size = engine.drafter.vocab_size
        self._incarnation = incarnation
        self._fingerprint = drafter_fingerprint
        self.max_streams = max_streams  # those that are open stay
        self._clients = itertools.count()
        self._open = 0
        self._quiet = asyncio.Event()  # while no stream is open
        self._quiet.set()

    async def ended(self) -> None:
        """Wait until no stream is open: a stopped server returns before its streams' last words."""
        await self._quiet.wait()

    async def Connect(  # noqa: N802 - the name is the contract's
        self,
        request_iterator: AsyncIterator[pb.ConnectRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Serve one verifier until its stream ends; then forget its sessions."""
        try:
            self._greet(await anext(request_iterator, None))
        except (ProtocolError, OverloadedError) as error:
            await abort(context, error)
        stream = _Stream(next(self._clients))
        self._open += 1
        self._quiet.clear()
        writer = asyncio.create_task(self._write(context, stream.outgoing))
        try:
            async for message in request_iterator:
                if message.HasField("work"):
                    self._take(stream, message.work)
                elif message.HasField("free"):
                    self._worker.free(stream.client, list(message.free.sessions))
        except ProtocolError as error:
            await abort(context, error)
        finally:
            self._worker.free(stream.client, None)
            writer.cancel()
            self._open -= 1
            if not self._open:
                self._quiet.set()

    def _greet(self, first: pb.ConnectRequest | None) -> None:
        """ProtocolError or OverloadedError if the verifier cannot be served."""
        if first is None or not first.HasField("hello"):
            raise ProtocolError("the first message of a stream must be a hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"this draft service speaks protocol version {PROTOCOL_VERSION}, the verifier "
                f"{hello.protocol_version}: run the same release on both sides"
            )
        if hello.drafter_fingerprint != self._fingerprint:
            raise ProtocolError(
                f"this draft service hosts drafter {self._fingerprint}, the verifier is set up "
                f"for {hello.drafter_fingerprint}: give both the same checkpoint"
            )
        if self._open >= self.max_streams:
            raise OverloadedError(f"{self._open} verifiers are connected, the most allowed")
        log.info("verifier %s connected", hello.verifier)

    async def _write(
        self, context: grpc.aio.ServicerContext, outgoing: asyncio.Queue[pb.ReplyBatch]
    ) -> None:
        welcome = pb.Welcome(draft=self._incarnation, block_size=self._block_size, credits=CREDITS)
        await context.write(pb.ConnectResponse(welcome=welcome))
        while True:
            await context.write(pb.ConnectResponse(reply=await outgoing.get()))

    def _take(self, stream: _Stream, batch: pb.WorkBatch) -> None:
        if stream.unanswered >= CREDITS:
            raise ProtocolError(
                f"{CREDITS} work batches may be unanswered at a time, and another one came: wait "
                "for a reply before sending more"
            )
        stream.unanswered += 1
        works: list[DraftWork] = []
        for message in batch.works[:MAX_WORKS]:
            try:
                works.append(work_from_pb(message, self._width, self._vocab_size))
            except ProtocolError as error:  # this work alone goes unanswered
                log.warning("a draft work was dropped: %s", error)
        loop, sequence = asyncio.get_running_loop(), batch.sequence

        def answer(proposals: list[BlockProposal], resyncs: list[ResyncRequest]) -> None:
            reply = pb.ReplyBatch(
                sequence=sequence,
                proposals=[proposal_to_pb(p) for p in proposals],
                resyncs=[resync_to_pb(r) for r in resyncs],
            )
            loop.call_soon_threadsafe(stream.answer, reply)

        self._worker.submit(stream.client, works, answer)
