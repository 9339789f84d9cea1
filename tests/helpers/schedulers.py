"""Schedulers as processes of their own, and a way to cut one off from its store."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from helpers.relay import pump

from dspark.config import ServeConfig, build

_TESTS = Path(__file__).resolve().parents[1]


class SchedulerProcess:
    """A SchedulerService without Ray."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.address = ""

    async def start(self) -> SchedulerProcess:
        """Returns once it serves and has stood for election."""
        paths = os.pathsep.join([str(_TESTS), str(_TESTS.parent)])
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "helpers.schedulers",
            json.dumps(self._settings),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self._process.stdout is not None
        self.address = (await self._process.stdout.readline()).decode().strip()
        assert self.address, "the scheduler did not start; its reason is on stderr"
        return self

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        """As if the machine had gone: nothing is said to anybody."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Proxy:
    """Passes bytes to a Unix socket, until it is cut: then nothing gets through any more."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.socket, self._target = folder / "proxy.sock", target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def start(self) -> Proxy:
        self._server = await asyncio.start_unix_server(self._serve, self.socket)
        return self

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._writers):
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_unix_connection(self._target)
        ends = {writer, their_writer}
        self._writers |= ends
        await asyncio.gather(pump(reader, their_writer), pump(their_reader, writer))
        self._writers -= ends


def _main() -> None:
    from dspark.services.scheduler.service import SchedulerService

    async def serve() -> None:
        service = SchedulerService(build(ServeConfig, json.loads(sys.argv[1])))
        print(await service.start("127.0.0.1"), flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    _main()
