"""A peer that falls silent without hanging up: what streams from it breaks, and soon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from helpers.relay import Relay

from dspark.rpc.options import channel_options, server_options

_PATIENCE_S = 30.0  # half of what gRPC takes by itself


async def _talk(_: bytes, context: Any) -> AsyncIterator[bytes]:
    while True:
        yield b"token"
        await asyncio.sleep(0.02)


async def _read_on(call: Any) -> None:
    while True:
        await call.read()


async def test_a_stream_breaks_when_nothing_gets_through_any_more() -> None:
    server = grpc.aio.server(options=server_options())
    handler = grpc.unary_stream_rpc_method_handler(_talk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Talk": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    relay = Relay("127.0.0.1", lambda: f"127.0.0.1:{port}")
    try:
        async with grpc.aio.insecure_channel(relay.address, options=channel_options()) as channel:
            call = channel.unary_stream("/t/Talk")(b"")
            for _ in range(20):  # so that gRPC measures the bandwidth, with pings of its own
                await call.read()
            relay.cut()
            with pytest.raises(grpc.aio.AioRpcError) as broken:
                await asyncio.wait_for(_read_on(call), _PATIENCE_S)
            assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await asyncio.to_thread(relay.close)
        await server.stop(None)
