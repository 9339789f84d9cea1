"""A TCP relay to the scheduler that can be cut, as a network is: nothing gets through, or back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable


class Relay:
    """On a thread of its own. `target` says, before each connection, where to."""

    def __init__(self, host: str, target: Callable[[], str]) -> None:
        self._host, self._target = host, target
        self._loop = asyncio.new_event_loop()
        self._open: asyncio.Event | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def cut(self) -> None:
        """From now on bytes stay here, connections included: nobody is told of an end."""
        assert self._open is not None
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """What has stayed here goes on."""
        assert self._open is not None
        self._loop.call_soon_threadsafe(self._open.set)

    def close(self) -> None:
        """End all connections."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> str:
        self._open = asyncio.Event()
        self._open.set()
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        return f"{self._host}:{self._server.sockets[0].getsockname()[1]}"

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: those of asyncio's servers complain when they are cancelled.
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._open is not None
        try:
            await self._open.wait()
            host, _, port = (await asyncio.to_thread(self._target)).rpartition(":")
            their_reader, their_writer = await asyncio.open_connection(host, int(port))
        except Exception:  # the scheduler is away, or Ray does not know where it is
            writer.close()
            return
        try:
            await asyncio.gather(
                pump(reader, their_writer, self._open), pump(their_reader, writer, self._open)
            )
        finally:
            writer.close()
            their_writer.close()


async def pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event | None = None
) -> None:
    """Bytes from one to the other until either ends; `passes`: while they may."""
    try:
        while data := await reader.read(65536):
            if passes is not None:
                await passes.wait()
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
