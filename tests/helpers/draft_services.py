"""Draft services over a real server, in this process, for a tiny target."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from helpers.tiny import tiny_drafter, tiny_target

from dspark.engine.drafting import DraftEngine, Drafter
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.pb import draft_pb2 as pb
from dspark.pb import draft_pb2_grpc
from dspark.rpc.server import ReplicaServer
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.services.draft.servicer import DraftServicer
from dspark.services.draft.worker import DraftWorker

WEIGHTS = "w"
TARGET = tiny_target()


def dspark() -> Drafter:
    return DSparkBlocks(tiny_drafter(TARGET))


@contextmanager
def worker(
    drafter: Callable[[], Drafter] = dspark, *, max_batch_works: int = 64, start: bool = True
) -> Iterator[tuple[DraftWorker, DraftEngine]]:
    engine = DraftEngine(drafter(), num_pages=64)
    made = DraftWorker(engine, max_batch_works, lambda error: None)
    if start:
        made.start()
    yield made, engine
    made.stop()
    assert made.failure is None
    assert engine.sessions == 0, "a stream ended and left sessions behind"


@asynccontextmanager
async def serving(
    servicer: Any, port: int = 0, transport: Transport = PLAINTEXT
) -> AsyncIterator[str]:
    server = ReplicaServer(certificates=transport.certificates)
    draft_pb2_grpc.add_DraftServicer_to_server(servicer, server.server)
    port = await server.start("127.0.0.1", port, [pb.DESCRIPTOR.services_by_name["Draft"]])
    yield f"127.0.0.1:{port}"
    await server.stop(0)
    if isinstance(servicer, DraftServicer):
        await servicer.ended()


@asynccontextmanager
async def draft_service(
    port: int = 0,
    drafter: Callable[[], Drafter] = dspark,
    transport: Transport = PLAINTEXT,
) -> AsyncIterator[str]:
    with worker(drafter) as (made, engine):
        servicer = DraftServicer(
            made, engine, incarnation="d", drafter_fingerprint=WEIGHTS, max_streams=4
        )
        async with serving(servicer, port, transport) as address:
            yield address


class Silent(draft_pb2_grpc.DraftServicer):
    """Welcomes everyone, answers nothing."""

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        await anext(request_iterator)
        welcome = pb.Welcome(draft="silent", block_size=4, credits=1000)
        await context.write(pb.ConnectResponse(welcome=welcome))
        async for _ in request_iterator:
            pass
