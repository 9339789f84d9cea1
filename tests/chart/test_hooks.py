"""What the kubelet runs in the pods: probes and hooks, run here."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.chart import CHART, cases, render


@contextmanager
def health(status: int) -> Iterator[int]:
    """The port of a proxy that answers /health so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1]
        server.shutdown()


def container(case: str, pool: str) -> dict[str, Any]:
    one: dict[str, Any] = render(cases()[case]).groups[pool]["template"]["spec"]["containers"][0]
    return one


@pytest.mark.parametrize(
    ("status", "listens", "ready"), [(200, True, True), (200, False, False), (503, True, False)]
)
def test_a_gateway_is_ready_with_both_its_listeners(
    status: int, listens: bool, ready: bool
) -> None:
    command = container("trial", "gateway")["readinessProbe"]["exec"]["command"]
    with health(status) as http, socket.socket() as grpc:
        grpc.bind(("127.0.0.1", 0))
        if listens:
            grpc.listen()
        port = str(grpc.getsockname()[1])
        here = [word.replace(":8000/", f":{http}/").replace("50051", port) for word in command]
        assert here != command
        ran = subprocess.run(here, capture_output=True, timeout=20)
    assert (ran.returncode == 0) == ready, ran.stderr


def test_a_gateway_with_tls_is_asked_with_tls() -> None:
    rendering = render(
        {**cases()["trial"], "tls": {"http": {"enabled": True, "existingSecret": "x"}}}
    )
    probe = rendering.groups["gateway"]["template"]["spec"]["containers"][0]["readinessProbe"]
    assert "https://127.0.0.1:8000/health" in probe["exec"]["command"][-1]


RAY = """
import pathlib, signal, sys
def end(*_):
    pathlib.Path(sys.argv[-1]).write_text("drained")
    sys.exit(1)  # as Ray does
signal.signal(signal.SIGTERM, end)
print("started", flush=True)
while True:
    signal.pause()
"""


def test_a_worker_that_is_to_end_has_ray_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = runpy.run_path(str(CHART / "files" / "end_worker.py"))
    (tmp_path / "ray").write_text(RAY)
    command = [sys.executable, str(tmp_path / "ray"), "start", "--address=h:6379", "--block"]
    # As under KubeRay, a shell is the parent, and signals to it end nothing.
    shell = subprocess.Popen(
        ["/bin/bash", "-c", '"$@"; exit 0', "-", *command, str(tmp_path / "said")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert shell.stdout is not None
    assert shell.stdout.readline() == "started\n"
    children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    # Nobody's Ray on this machine but that.
    monkeypatch.setattr(os, "listdir", lambda _: ["self", str(shell.pid), *children])
    monkeypatch.setattr(sys, "argv", ["end_worker.py", "0"])
    hook["main"]()
    assert (tmp_path / "said").read_text() == "drained"
    assert shell.wait(10) == 0
    shell.stdout.close()
    with pytest.raises(SystemExit, match="does not run here"):
        hook["main"]()


def test_a_client_is_someone_outside_the_pod() -> None:
    hook = runpy.run_path(str(CHART / "files" / "end_worker.py"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        hook["PORTS"].clear()
        hook["PORTS"].add(address[1])
        with socket.create_connection(address):
            assert not hook["connected"]()  # a probe, from inside
        with socket.create_connection(address, source_address=("127.0.0.2", 0)):
            assert hook["connected"]()
